"""Tiny models of Hugging Face's, rows for them, and their weighted loss in float64."""

from itertools import pairwise

import torch
from reference import Batch
from reference_methods import reference
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 40
DOMAINS = ("code", "prose")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "use_cache": False}
_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": VOCABULARY}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2)),
    "gemma 2, soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=0.3, sliding_window=64)
    ),
    "cohere, logit scale": lambda: CohereForCausalLM(CohereConfig(**_SIZES, logit_scale=3.0)),
    "mixtral, experts": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, **_EXPERTS)),
}
SPECS = ("dro-kl", "mile", "dft", "linupper-x-mile", "group-dro", "uniform")


def model(name="llama", dtype=torch.float32):
    """Return a model, always the same one, in training mode; its logits are not all alike."""
    torch.manual_seed(0)
    made = MAKE[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.train().to(dtype)


def rows(number=8, seed=0):
    """Return rows of unequal length from two domains; of every third the prompt is masked."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(number):
        ids = torch.randint(3, VOCABULARY, (4 + (5 * i) % 9,), generator=draw).tolist()
        labels = [-100, -100, *ids[2:]] if i % 3 == 0 else list(ids)
        found.append({"input_ids": ids, "labels": labels, "domain": DOMAINS[i * i % 4 > 0]})
    return found


def padded(samples):
    """Return rows as a batch of tensors, padded on the right, with a mask."""
    length = max(len(x["input_ids"]) for x in samples)

    def lines(name, fill):
        return torch.tensor([x[name] + [fill] * (length - len(x[name])) for x in samples])

    mask = torch.tensor([[int(i < len(x["input_ids"])) for i in range(length)] for x in samples])
    return {
        "input_ids": lines("input_ids", 0),
        "labels": lines("labels", -100),
        "attention_mask": mask,
        "domain": torch.tensor([DOMAINS.index(x["domain"]) for x in samples]),
    }


def flattened(samples, per_row=None):
    """Return rows end to end, `per_row` in each row of the batch; all in one when None."""
    per_row = per_row or len(samples)
    lines = []
    for at in range(0, len(samples), per_row):
        line = {"input_ids": [], "labels": [], "position_ids": [], "domain": []}
        for x in samples[at : at + per_row]:
            n = len(x["input_ids"])
            line["input_ids"] += x["input_ids"]
            line["labels"] += [-100, *x["labels"][1:]]
            line["position_ids"] += range(n)
            line["domain"] += [DOMAINS.index(x["domain"])] * n
        lines.append(line)
    length = max(len(line["input_ids"]) for line in lines)
    fill = {"labels": -100}
    return {
        name: torch.tensor([x[name] + [fill.get(name, 0)] * (length - len(x[name])) for x in lines])
        for name in lines[0]
    }


def samples_of(batch):
    """Return for each sample of a batch its row and the places of its tokens."""
    found = []
    for row, ids in enumerate(batch["input_ids"]):
        starts = [0]
        if "position_ids" in batch:
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
        found += [(row, range(a, b)) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return found


def measured(made, batch):
    """Return the signals of each sample's labels and their losses in float64, with gradient.

    Args:
        made: A model.
        batch: What it is given, and `domain`.
    """
    inputs = {k: v for k, v in batch.items() if k not in {"labels", "domain"}}
    log_probs = made(**inputs).logits.double().log_softmax(-1)
    domain = batch["domain"]
    lists = {name: [] for name in ("loss", "valid", "entropy", "prob", "domain", "norm")}
    nlls = []
    for row, places in samples_of(batch):
        line = {name: [] for name in lists}
        for t, after in pairwise(places):
            label = int(batch["labels"][row, after])
            log_prob = log_probs[row, t]
            line["valid"].append(label != -100)
            nlls.append(-log_prob[max(label, 0)])
            line["loss"].append(float(nlls[-1].detach()))
            line["entropy"].append(float(-(log_prob.exp() * log_prob).sum().detach()))
            line["prob"].append(float(log_prob[max(label, 0)].detach().exp()))
            line["norm"].append(0.0)
            where = domain[row] if domain.dim() == 1 else domain[row, t]
            line["domain"].append(DOMAINS[int(where)])
        for name, values in line.items():
            lists[name].append(values)
    return lists, nlls


def weighted(found, method, step=1):
    """Return sum_t u_t * nll_t in float64, and the number of labels, of what was measured.

    Args:
        found: What `measured` returns.
        method: What `reference_methods.reference` returns.
        step: The optimizer step.
    """
    lists, nlls = found
    weights = method(
        Batch(
            loss=lists["loss"],
            valid=lists["valid"],
            entropy=lists["entropy"],
            target_prob=lists["prob"],
            error_norm=lists["norm"],
            ref_loss=lists["loss"],
            domain=lists["domain"],
            document=[[0] * len(x) for x in lists["loss"]],
            columns={},
            domains=DOMAINS,
            step=step,
        )
    )
    flat = [w for line in weights for w in line]
    kept = [ok for line in lists["valid"] for ok in line]
    total = sum(w * nll for w, nll, ok in zip(flat, nlls, kept, strict=True) if ok)
    return total, sum(kept)


def weighted_sum(float64_model, batch, method, step=1):
    """Return sum_t u_t * nll_t in float64, and the number of labels, of a batch."""
    return weighted(measured(float64_model, batch), method, step)


def descended(name, spec, steps, lr=0.1):
    """Return the losses and parameters of a float64 model after steps of plain gradient descent.

    Args:
        name: The model's.
        spec: A spec's name.
        steps: For each step the batches of which it accumulates the gradient.
        lr: Learning rate.
    """
    made, method, losses = model(name, torch.float64), reference(spec, DOMAINS), []
    for step, batches in enumerate(steps, 1):
        sums = [weighted_sum(made, batch, method, step) for batch in batches]
        loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
        made.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.grad is not None:
                    parameter.sub_(lr * parameter.grad)
    return losses, dict(made.named_parameters())
