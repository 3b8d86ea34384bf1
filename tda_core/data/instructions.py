"""Instructions and classifications by name, and anybody's own JSON, JSON lines or CSV, as prompts with responses.

| name            | what                                            | from the Hugging Face hub, file           |
|-----------------|-------------------------------------------------|-------------------------------------------|
| alpaca          | 52,002 instructions with text-davinci's answers | tatsu-lab/alpaca, alpaca_data.json        |
| alpaca_cleaned  | the same, repaired by hand                      | yahma/alpaca-cleaned, alpaca_data_cleaned.json |
| sst2_train      | 6,920 film reviews, positive or negative        | SetFit/sst2, train.jsonl                  |
| sst2_validation | 872 of them                                     | SetFit/sst2, dev.jsonl                    |
| sst2_test       | 1,821 of them                                   | SetFit/sst2, test.jsonl                   |

Files are looked for in `TDA_DATA_DIR` and `data/`, below hub/<owner>/<repository>/, then in the hub's own cache, and
then downloaded into that. A file of one's own: `read_pairs("my.csv", Form(("{question}",), "answer"))`.
"""

import csv
import hashlib
import io
import json
import string
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tda_core import paths
from tda_core.data.files import DataUnavailable
from tda_core.text_pairs import TextPairs


@dataclass(frozen=True)
class Form:
    """How a row's columns become a pair.

    prompt: parts such as "Instruction: {instruction}", each with one column or more in braces, joined by a space; a
    part whose columns are all empty in a row is left out of that row's prompt. response: the name of a column, whose
    text follows a prompt after a space: what is scored behind "Sentiment:" is " positive".
    Raises ValueError for no response.
    """

    prompt: tuple[str, ...]
    response: str

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            raise TypeError(f"prompt must be a tuple of parts, got one text {self.prompt[:40]!r}")
        if not self.response:
            raise ValueError("response must name the column that holds the response, got ''")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        return (*(name for part in self.prompt for name in _columns_of(part)), self.response)

    def prompt_of(self, row: Mapping[str, str]) -> str:
        """The prompt of one row."""
        kept = [part for part in self.prompt if not _columns_of(part) or any(row[c].strip() for c in _columns_of(part))]
        return " ".join(part.format_map(row) for part in kept)

    def pair_of(self, row: Mapping[str, str]) -> tuple[str, str]:
        """Prompt and response of one row."""
        prompt, response = self.prompt_of(row), row[self.response]
        apart = not prompt or prompt[-1].isspace() or response[0].isspace()
        return prompt, response if apart else f" {response}"


@dataclass(frozen=True)
class HubFile:
    """One file of a data set on the hub. revision: a commit, or a branch, whose contents may change.

    sha256: checked where it is known ("": not checked).
    """

    repository: str
    name: str
    revision: str
    form: Form
    sha256: str = ""


ALPACA = Form(("Instruction: {instruction}", "Input: {input}", "Response:"), "output")
SENTIMENT = Form(("Review: {text}", "Sentiment:"), "label_text")
_ALPACA_COMMIT, _SST2_COMMIT = "c03f9680520799925ed04303c9ea24ecf522a34c", "00ea8ccb7a54b4e3780a3e51aa3f80361ff849c0"
HUB: dict[str, HubFile] = {
    "alpaca": HubFile("tatsu-lab/alpaca", "alpaca_data.json", _ALPACA_COMMIT, ALPACA),
    "alpaca_cleaned": HubFile("yahma/alpaca-cleaned", "alpaca_data_cleaned.json", "main", ALPACA),
    "sst2_train": HubFile("SetFit/sst2", "train.jsonl", _SST2_COMMIT, SENTIMENT),
    "sst2_validation": HubFile("SetFit/sst2", "dev.jsonl", _SST2_COMMIT, SENTIMENT),
    "sst2_test": HubFile("SetFit/sst2", "test.jsonl", _SST2_COMMIT, SENTIMENT),
}


def load_pairs(name: str, *, n: int | None = None) -> TextPairs:
    """The first n pairs (None: all) of a data set by name, see the table above.

    Rows with an empty response are left out, with one warning that counts them. Raises ValueError for an unknown
    name, a file of other contents, and an n that is not in 1..(how many there are); DataUnavailable, which says what
    to put where, without a network.
    """
    if name not in HUB:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(HUB)}")
    file = HUB[name]
    pairs = read_pairs(fetch(file), file.form)
    if n is not None and not 1 <= n <= len(pairs):
        raise ValueError(f"n must lie in 1..{len(pairs)}, what {name} has, got {n}")
    return pairs[:n]


def read_pairs(path: str | Path, form: Form) -> TextPairs:
    """The rows of a .json (a list of objects), .jsonl (an object a line) or .csv file (with a header) as pairs.

    Numbers become text; an absent or null value is empty. Rows with an empty response are left out, with one warning
    that counts them. Raises ValueError naming the file for another ending, contents that are not rows, a column that
    no row has, and a file without a response; FileNotFoundError where there is no file.
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    there = {column for row in rows for column in row}
    for column in form.columns:
        if column not in there:
            raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(sorted(map(str, there)))}")
    texts = [{column: _text(row.get(column)) for column in form.columns} for row in rows]
    kept = [row for row in texts if row[form.response].strip()]
    if not kept:
        raise ValueError(f"{path}: column {form.response!r} is empty in all {len(texts)} rows")
    if len(kept) < len(texts):
        dropped = len(texts) - len(kept)
        warnings.warn(f"{path.name}: {dropped} of {len(texts)} rows have no response and are left out", stacklevel=2)
    return TextPairs(*zip(*(form.pair_of(row) for row in kept), strict=True))


def fetch(file: HubFile) -> Path:
    """Path of the file: from a data folder, the hub's cache, or the hub.

    Raises DataUnavailable where it cannot be had, and ValueError for contents other than its checksum says.
    """
    places = [folder / "hub" / file.repository / file.name for folder in paths.data_dirs()]
    path = next((place for place in places if place.is_file()), None) or _download(file, places)
    if file.sha256:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != file.sha256:
            raise ValueError(f"{path} is not the expected file: its sha256 is {found}, expected {file.sha256}")
    return path


def _download(file: HubFile, places: list[Path]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        return Path(
            huggingface_hub.hf_hub_download(file.repository, file.name, repo_type="dataset", revision=file.revision)
        )
    except (OSError, HFValidationError, RevisionResolutionError) as error:  # offline, absent, gated or not writable
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataUnavailable(
            f"{file.name} of the data set {file.repository} (revision {file.revision}) is not on this machine and "
            f"could not be downloaded ({why}). With a network, run again; without one, fetch {file.name} elsewhere "
            f"from https://huggingface.co/datasets/{file.repository} and put it at "
            f"$TDA_DATA_DIR/hub/{file.repository}/{file.name} or at {places[-1]}"
        ) from error


def _rows(path: Path) -> list[dict]:
    if path.suffix not in (".json", ".jsonl", ".csv"):
        raise ValueError(f"{path} must end in .json, .jsonl or .csv, got {path.suffix!r}")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        else:  # split at line feeds alone: texts may hold other characters that Python takes for ends of lines
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of objects, one a pair")
    return rows


def _columns_of(part: str) -> tuple[str, ...]:
    return tuple(name for _, name, _, _ in string.Formatter().parse(part) if name is not None)


def _text(value: object) -> str:
    return "" if value is None else str(value)
