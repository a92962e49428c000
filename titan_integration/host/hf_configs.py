"""The `config.json` of a model, as Hugging Face's transformers spells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

if TYPE_CHECKING:
    from torchtitan.protocols.model_spec import ModelSpec


def hf_config(spec: ModelSpec, assets: str, length: int) -> dict[str, Any]:
    """Return the config of a model of the host's: of Llama-3, Qwen3 or DeepSeek-V3.

    Of other models it is the `config.json` that lies with the tokenizer, as downloads have it.

    Args:
        spec: The model.
        assets: The folder of its tokenizer.
        length: Tokens of the longest text, where the model does not say it.

    Raises:
        ValueError: There is none to be had, the host cannot convert the model, or transformers has
            no such model.
    """
    if spec.state_dict_adapter is None:
        msg = f"{spec.name} {spec.flavor}: the host has no conversion of it to Hugging Face's names"
        raise ValueError(msg)
    if spec.name in _MAKERS:
        return _MAKERS[spec.name](spec.model, length)
    there = Path(assets) / "config.json"
    if there.is_file():
        return json.loads(there.read_text(encoding="utf-8"))
    msg = (
        f"{spec.name} {spec.flavor}: its config.json is not written from the model, as that of "
        f"{', '.join(_MAKERS)} is; put the published one beside the tokenizer, into {assets}"
    )
    raise ValueError(msg)


def refuse_untold(spec: ModelSpec, state: dict[str, Any] | None = None) -> None:
    """Refuse a state that transformers' model of that name has no place for.

    Args:
        spec: The model.
        state: What it has learnt; None before it is trained.

    Raises:
        ValueError: Experts are chosen, or will be, with a bias that its router lacks.
    """
    if spec.name != "qwen3":
        return
    if state is None:
        layers = cast("Any", spec.model).layers
        experts = [moe for block in layers if (moe := block.moe) is not None]
        biased = any(moe.load_balance_coeff is not None for moe in experts)
    else:
        biases = [x for key, x in state.items() if key.endswith("expert_bias_E")]
        biased = any(bool(x.any()) for x in biases)
    if biased:
        msg = (
            f"{spec.name} {spec.flavor}: experts are chosen with a bias that balances their load, "
            "which transformers' Qwen3 lacks; train with load_balance_coeff=None in its layers to "
            "export it"
        )
        raise ValueError(msg)


def _llama(model: Any, length: int) -> dict[str, Any]:  # noqa: ANN401 - a config of the host's
    rope = model.layers[0].attention.rope
    assert isinstance(rope, ComplexRoPE.Config)
    found = _dense(model, length) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": False,
    }
    if rope.scaling == "llama":
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": rope.scaling_factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return found


def _qwen3(model: Any, length: int) -> dict[str, Any]:  # noqa: ANN401
    assert isinstance(model.layers[0].attention.rope, CosSinRoPE.Config)
    found = _dense(model, length) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "use_sliding_window": False,
    }
    if (moe := model.layers[0].moe) is None:
        return found
    experts = moe.routed_experts.inner_experts
    return found | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "moe_intermediate_size": experts.hidden_dim,
        "intermediate_size": experts.hidden_dim,
        "norm_topk_prob": moe.router.route_norm,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _deepseek_v3(model: Any, length: int) -> dict[str, Any]:  # noqa: ANN401
    dense = [block for block in model.layers if block.moe is None]
    moe = model.layers[-1].moe
    attention, router = model.layers[0].attention, moe.router
    rope, hidden = attention.rope, moe.routed_experts.inner_experts.hidden_dim
    if router.score_func != "sigmoid":
        msg = (
            f"experts are scored by {router.score_func}, and transformers' DeepSeek-V3 scores them "
            "by sigmoid"
        )
        raise ValueError(msg)
    shared = moe.shared_experts.w1.out_features if moe.shared_experts is not None else 0
    found = _common(model, length) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rope_interleave": True,
        "intermediate_size": dense[0].feed_forward.w1.out_features if dense else hidden,
        "moe_intermediate_size": hidden,
        "first_k_dense_replace": len(dense),
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": shared // hidden,
        "num_experts_per_tok": router.top_k,
        "n_group": router.num_expert_groups or 1,
        "topk_group": router.num_limited_groups or 1,
        "norm_topk_prob": router.route_norm,
        "routed_scaling_factor": router.route_scale,
    }
    if rope.scaling == "yarn" and rope.rope_factor > 1:
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": rope.rope_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "original_max_position_embeddings": rope.original_seq_len,
            "truncate": rope.truncate,
            "mscale_all_dim": attention.mscale,  # scales scores, as the host does,
            "attention_factor": 1.0,  # and not the rotations as well
        }
    return found


def _dense(model: Any, length: int) -> dict[str, Any]:  # noqa: ANN401
    """Return what decoders with grouped heads have in common."""
    block = model.layers[0]
    attention = block.attention
    if attention.rope.scaling == "yarn" and attention.rope.rope_factor > 1:
        msg = "rotary positions are scaled by YaRN, for which no config.json is written yet"
        raise ValueError(msg)
    heads = attention.n_heads
    found = _common(model, length) | {
        "num_attention_heads": heads,
        "num_key_value_heads": attention.n_kv_heads or heads,
        "head_dim": attention.head_dim or model.dim // heads,
    }
    if block.feed_forward is not None:
        found["intermediate_size"] = cast("int", block.feed_forward.w1.out_features)
    return found


def _common(model: Any, length: int) -> dict[str, Any]:  # noqa: ANN401
    """Return what all decoders have in common."""
    rope = model.layers[0].attention.rope
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": len(model.layers),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "max_position_embeddings": max(rope.max_seq_len, length),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.enable_weight_tying,
        "use_cache": True,
    }


_MAKERS = {"llama3": _llama, "qwen3": _qwen3, "deepseek_v3": _deepseek_v3}
