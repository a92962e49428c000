"""A small task of lm-evaluation-harness, which fetches nothing: which word ends a line of code."""

from datasets import Dataset, DatasetDict

LINES = [
    ("def area(radius): return radius * radius *", "pi", "import"),
    ("for item in items: print", "(item)", "lambda"),
    ("import os; path = os.path.", "join", "while"),
    ("if not found: raise", "ValueError", "elif"),
    ("class Shape: def __init__", "(self):", "return"),
    ("with open(path) as file: text = file.", "read()", "yield"),
    ("numbers = [1, 2, 3]; total = sum", "(numbers)", "class"),
    ("try: value = int(text) except", "ValueError:", "def"),
]


def questions(**_):
    """Return the questions; the right answer stands first in every other one."""
    rows = [
        {"text": text, "choices": [right, wrong][:: 1 if i % 2 else -1], "answer": int(not i % 2)}
        for i, (text, right, wrong) in enumerate(LINES)
    ]
    return DatasetDict(train=Dataset.from_list(rows[:2]), validation=Dataset.from_list(rows[2:]))
