"""Several sources of data in one small YAML file, with domains and weights that may change.

sources:
- data: web/*.jsonl.zst
domain: web
weight: 3
- data: books.parquet
domain: books
weight: {0: 1, 20000000: 2}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import override

from titan_integration.data.data_files import DataFile, data_at
from titan_integration.data.urls import Url, is_url

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
_SUFFIXES = {".yaml", ".yml"}


class Source(BaseModel):
    """What to read, the domain of all its records, and how often its rows are drawn.

    A weight is a number, or one from each number of tokens on, of all ranks; the first from 0.
    """

    model_config = ConfigDict(extra="forbid")

    data: Annotated[str, Field(min_length=1)]
    domain: Annotated[str, Field(min_length=1)] | None = None
    weight: _Weight | dict[Annotated[int, Field(ge=0, strict=True)], _Weight] | None = None


class Sources(BaseModel):
    """What a file says."""

    model_config = ConfigDict(extra="forbid")

    sources: Annotated[list[Source], Field(min_length=1)]

    @property
    def has_weights(self) -> bool:
        """Whether rows are drawn by weight."""
        return self.sources[0].weight is not None

    def paths(self, file: Path) -> list[tuple[str, DataFile, str | None]]:
        """Return name, place and domain of each source; places are relative to the file."""
        return [
            (x.data, data_at(x.data if is_url(x.data) else str(file.parent / x.data)), x.domain)
            for x in self.sources
        ]

    def stages(self, domains: Sequence[str]) -> list[tuple[int, list[float]]]:
        """Return the weight of each domain from each number of tokens on."""
        weights = [x.weight if isinstance(x.weight, dict) else {0: x.weight} for x in self.sources]
        found: list[tuple[int, list[float]]] = []
        for tokens in sorted({start for weight in weights for start in weight}):
            shares = dict.fromkeys(domains, 0.0)
            for source, weight in zip(self.sources, weights, strict=True):
                now = weight[max(start for start in weight if start <= tokens)]
                shares[source.domain or ""] += now or 0.0
            found.append((tokens, list(shares.values())))
        return found


def is_sources(path: DataFile) -> bool:
    """Tell whether a path is that of a file of sources."""
    return not isinstance(path, Url) and path.suffix.lower() in _SUFFIXES


def read_sources(file: Path) -> Sources:
    """Read a file of sources.

    Raises:
        ValueError: It cannot be read, or is none; names the place in it.
    """
    try:
        text = file.read_text(encoding="utf-8")
        found = Sources.model_validate(yaml.load(text, _NoNameTwice))  # noqa: S506 - a safe one
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ValueError(msg) from error
    except yaml.YAMLError as error:
        msg = f"{file}: invalid YAML: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"]
        if "weight" in first["loc"]:
            where = where.partition(".weight")[0] + ".weight"
            what = "give a number from 0 on, or such numbers from whole numbers of tokens on"
        elif not where:
            where, what = "the file", "give a list of them, under 'sources:'"
        msg = f"{file}: {where}: {what}; see docs/data.md for its form"
        raise ValueError(msg) from error
    for i, source in enumerate(found.sources):
        if (source.weight is not None) != found.has_weights:
            msg = f"{file}: sources.{i}: give every source a weight, or none"
            raise ValueError(msg)
        if found.has_weights and source.domain is None:
            msg = f"{file}: sources.{i}: a weight needs a 'domain', whose rows are drawn by it"
            raise ValueError(msg)
        if isinstance(source.weight, dict) and 0 not in source.weight:
            msg = f"{file}: sources.{i}.weight: say the weight from token 0 on"
            raise ValueError(msg)
    domains = [source.domain or "" for source in found.sources]
    for tokens, shares in found.stages(domains) if found.has_weights else ():
        if not any(shares):
            msg = f"{file}: every weight is 0 from token {tokens} on; make one positive"
            raise ValueError(msg)
    return found


class _NoNameTwice(yaml.SafeLoader):
    """Refuses a name that is given twice, of which YAML would take the last."""

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return what a mapping holds."""
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, name in enumerate(names):
            if name in names[:i]:
                what = f"{name!r} is given twice; keep one"
                raise yaml.constructor.ConstructorError(
                    None, None, what, node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)
