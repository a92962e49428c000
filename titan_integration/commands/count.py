"""How often each token of a vocabulary is a label of a data set.

What `weighting count` calls.  One process reads the data as a run does, and needs no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from titan_integration.commands import train as launch
from titan_integration.data.contents import Encoder, check_vocabulary
from titan_integration.data.label_counts import count_labels, vocabulary, write_counts
from titan_integration.data.loader import DomainTextDataLoader, load_documents
from titan_integration.host import versions
from titan_integration.host.flags import parse
from titan_integration.host.quiet import quiet
from titan_integration.trainer.preflight import build_tokenizer
from weighting.errors import printable

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Options(launch.HostOptions):
    """What counting is given.

    Attributes:
        out: The JSON file to write.
        overwrite: Whether to replace it.
    """

    out: str
    overwrite: bool = False


def main(**options: Any) -> int:  # noqa: ANN401 - those of `Options`
    """Count, write the file, and say what was counted; return 0.

    Raises:
        ValueError: Data, tokenizer, configuration or file are not as they must be.
    """
    args = Options(**options)
    versions.check()
    launch.check_config(args.module, args.config)
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        msg = f"--out {out}: exists already; choose another name, or pass --overwrite"
        raise ValueError(msg)
    with quiet():  # The host's warnings are about training.
        flags = [*launch.host_flags(args, "uniform", "outputs/count"), *args.flags]
        config = cast("Trainer.Config", parse(flags))
        loader = config.dataloader
        if not isinstance(loader, DomainTextDataLoader.Config):
            msg = (
                f"the config's data loader is {type(loader).__qualname__}; use DomainTextDataLoader"
            )
            raise ValueError(msg)  # noqa: TRY004 - it is the config that is wrong
        where = loader.dataset_path or loader.dataset
        if loader.streaming:
            msg = f"{where} is streamed, and has no end that counting could reach; read it by index"
            raise ValueError(msg)
        tokenizer = build_tokenizer(config)
        documents = load_documents(loader)
        encode = Encoder(tokenizer)
        largest, place = documents.largest_id
        check_vocabulary(largest, encode.vocab_size, place)
        counts = count_labels(documents, encode, vocabulary(tokenizer))
    if not counts.any():
        msg = f"{where}: no token to predict in any document; give data with text"
        raise ValueError(msg)
    total, seen = int(counts.sum()), int((counts > 0).sum())
    made = {"data": where, "split": loader.split, "documents": len(documents), "labels": total}
    write_counts(out, counts, tokenizer, **made)
    print(  # noqa: T201 - the result
        f"{len(documents):,} documents, {total:,} labels, {seen:,} of {len(counts):,} tokens "
        f"among them\n\ncounted: {printable(args.out)}"
    )
    return 0
