"""How measurements are printed: a line for each name, median, smallest and largest."""

import json
import statistics
from collections.abc import Mapping, Sequence


def print_table(results: Mapping[str, Sequence[float]], *, as_json: bool) -> None:
    """Prints the values of each name, a JSON object a line or as text."""
    for name, values in results.items():
        line = {
            "name": name,
            "value": statistics.median(values),
            "minimum": min(values),
            "maximum": max(values),
        }
        text = "{name:28} {value:>10.4g}  ({minimum:.4g} .. {maximum:.4g})".format(**line)
        print(json.dumps(line) if as_json else text)
