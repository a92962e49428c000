"""The name of every file and folder that a run leaves below its dump folder.

<dump folder>/
.running                  which process has the folder
checkpoint/step-N/        what the trainer saved
weighting/
run.json                spec, configuration, versions and starts
metrics.jsonl           a line for each logged step
validation.jsonl        a line for each validation
evaluation.json         what benchmarks said of its checkpoints
mixture.yaml            the proportions of domains it found, as a spec
train.log               its log, where a terminal showed one line instead
record/                 sequences-*.parquet, documents-*.parquet, tokens-*.parquet
"""

from __future__ import annotations

FOLDER = "weighting"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
RUN = "run.json"
EVALUATION = "evaluation.json"
MIXTURE = "mixture.yaml"
LOG = "train.log"
RECORD = f"{FOLDER}/record"
SEQUENCES, DOCUMENTS, TOKENS = "sequences", "documents", "tokens"
"""What the names of a record's files begin with."""
CHECKPOINTS = "checkpoint"
LOCK = ".running"
