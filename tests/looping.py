"""Tables of cases walked inside one test: ten thousand tests of a millisecond take minutes."""

import functools
import inspect

import torch

SEED = 20260822
"""From which every test starts, and every case of a table."""


def seeded():
    """Start from the same random state; leave out GPUs, for which torch notes the stack."""
    torch.default_generator.manual_seed(SEED)


def for_each(names, values, ids=str):
    """Run a test for every value of a table; what fails names its values, all of them.

    Args:
        names: The argument of the test, or several with commas between them.
        values: The table, or a function that makes it when the test runs, not at import.
        ids: How a value is called in a message.
    """
    names = tuple(names.replace(" ", "").split(","))

    def decorate(test):
        signature = inspect.signature(test)
        others = [p for name, p in signature.parameters.items() if name not in names]

        @functools.wraps(test)
        def every_case(**fixtures):
            failed = {}
            table = list(values() if callable(values) else values)
            for value in table:
                seeded()
                case = value if len(names) > 1 else (value,)
                try:
                    test(**fixtures, **dict(zip(names, case, strict=True)))
                except Exception as error:  # noqa: BLE001 - collected and raised below
                    failed[ids(value)] = error
            if failed:
                first = next(iter(failed.values()))
                what = f"{', '.join(names)}: {len(failed)} of {len(table)} failed"
                msg = f"{what}: {'; '.join(failed)}\nthe first: {type(first).__name__}: {first}"
                raise AssertionError(msg) from first

        every_case.__signature__ = signature.replace(parameters=others)
        return every_case

    return decorate
