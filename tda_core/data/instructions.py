"""Instructions and classifications by name, and one's own JSON, JSON lines, CSV or parquet, as prompts with responses.

| name            | what                                            | from the Hugging Face hub, file           |
|-----------------|-------------------------------------------------|-------------------------------------------|
| alpaca          | 52,002 instructions with text-davinci's answers | tatsu-lab/alpaca, alpaca_data.json        |
| alpaca_cleaned  | the same, repaired by hand                      | yahma/alpaca-cleaned, alpaca_data_cleaned.json |
| sst2_train      | 6,920 film reviews, positive or negative        | SetFit/sst2, train.jsonl                  |
| sst2_validation | 872 of them                                     | SetFit/sst2, dev.jsonl                    |
| sst2_test       | 1,821 of them                                   | SetFit/sst2, test.jsonl                   |
| tulu | first turns, a third | allenai/tulu-v2-sft-mixture, data/train-00000-of-00003-99ee8754042a69f6.parquet |
| flan            | one of 66 tasks, as in "flan:rte"  | Muennighoff/flan, train/{task}_10templates_train.jsonl |
| safe_rlhf       | questions, the safer of two answers | PKU-Alignment/PKU-SafeRLHF, data/Alpaca-7B/train.jsonl |

Alpaca, Tulu (here V2's mixture), FLAN and SafeRLHF are the data of STRIDE's instruction tuning. Tulu is had as parquet
alone, which needs `pyarrow`.

Files are looked for in `TDA_DATA_DIR` and `data/`, below hub/<owner>/<repository>/, then in the hub's own cache, and
then downloaded into that. A file of one's own: `read_pairs("my.csv", Form(("{question}",), "answer"))`.
"""

import csv
import hashlib
import importlib.util
import io
import json
import string
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tda_core import paths
from tda_core.data.files import DataUnavailable
from tda_core.text_pairs import TextPairs


@dataclass(frozen=True)
class Form:
    """How a row's columns become a pair.

    prompt: parts such as "Instruction: {instruction}", each with one column or more in braces, joined by a space; a
    part whose columns are all empty in a row is left out of that row's prompt. response: the name of a column, whose
    text follows a prompt after a space: what is scored behind "Sentiment:" is " positive". A column in braces says
    which column it is in each row: "response_{better}" is response_0 where better is 0.
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
        """The columns that rows must have, but for one whose name is another's value."""
        of_response = _columns_of(self.response) or (self.response,)
        return (*(name for part in self.prompt for name in _columns_of(part)), *of_response)

    def response_of(self, row: Mapping[str, str]) -> str:
        """The response of one row, empty where the column that it should be in is absent."""
        return row.get(self.response.format_map(row), "")

    def prompt_of(self, row: Mapping[str, str]) -> str:
        """The prompt of one row."""
        kept = [part for part in self.prompt if not _columns_of(part) or any(row[c].strip() for c in _columns_of(part))]
        return " ".join(part.format_map(row) for part in kept)

    def pair_of(self, row: Mapping[str, str]) -> tuple[str, str]:
        """Prompt and response of one row."""
        prompt, response = self.prompt_of(row), self.response_of(row)
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

    @property
    def places(self) -> list[Path]:
        """Where the file may lie in a data folder."""
        return [folder / "hub" / self.repository / self.name for folder in paths.data_dirs()]

    def where_to_put(self) -> str:
        """Where the file comes from and belongs."""
        return (
            f"fetch {self.name} from https://huggingface.co/datasets/{self.repository} and put it at "
            f"$TDA_DATA_DIR/hub/{self.repository}/{self.name} or at {self.places[-1]}"
        )


ALPACA = Form(("Instruction: {instruction}", "Input: {input}", "Response:"), "output")
SENTIMENT = Form(("Review: {text}", "Sentiment:"), "label_text")
FLAN = Form(("{inputs}",), "targets")
TURNS = Form(("User: {user}", "Assistant:"), "assistant")
SAFER = Form(("Question: {prompt}", "Answer:"), "response_{safer_response_id}")
# FLAN's tasks (Wei et al. 2022, https://arxiv.org/abs/2109.01652) as the repository below cuts them into files.
FLAN_TASKS = tuple(
    "aeslc ag_news_subset anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb cnn_dailymail cola common_gen "
    "copa coqa cosmos_qa dart definite_pronoun_resolution drop e2e_nlg fix_punct gigaword glue_mrpc glue_qqp "
    "hellaswag imdb_reviews math_dataset mnli_matched mnli_mismatched multi_news multirc natural_questions "
    "openbookqa opinion_abstracts_idebate opinion_abstracts_rotten_tomatoes para_crawl_enes paws_wiki piqa qnli "
    "quac record rte samsum sentiment140 snli squad_v1 squad_v2 sst2 story_cloze stsb trec trivia_qa true_case "
    "web_nlg_en wic wiki_lingua_english_en wmt14_enfr wmt16_translate_csen wmt16_translate_deen "
    "wmt16_translate_fien wmt16_translate_roen wmt16_translate_ruen wmt16_translate_tren wnli word_segment wsc "
    "yelp_polarity_reviews".split()
)
_TULU_COMMIT, _FLAN_COMMIT = "6248b175d2ccb5ec7c4aeb22e6d8ee3b21b2c752", "049702ca5ffc5b3c62bf226aac67ba1493e8d548"
_SAFE_COMMIT = "74baebd4502573cdf0bdb1c4bb7d359f40cdf77b"
_TULU_FILE = "data/train-00000-of-00003-99ee8754042a69f6.parquet"
_ALPACA_COMMIT, _SST2_COMMIT = "c03f9680520799925ed04303c9ea24ecf522a34c", "00ea8ccb7a54b4e3780a3e51aa3f80361ff849c0"
HUB: dict[str, HubFile] = {
    "alpaca": HubFile("tatsu-lab/alpaca", "alpaca_data.json", _ALPACA_COMMIT, ALPACA),
    "alpaca_cleaned": HubFile("yahma/alpaca-cleaned", "alpaca_data_cleaned.json", "main", ALPACA),
    "sst2_train": HubFile("SetFit/sst2", "train.jsonl", _SST2_COMMIT, SENTIMENT),
    "sst2_validation": HubFile("SetFit/sst2", "dev.jsonl", _SST2_COMMIT, SENTIMENT),
    "sst2_test": HubFile("SetFit/sst2", "test.jsonl", _SST2_COMMIT, SENTIMENT),
    "tulu": HubFile("allenai/tulu-v2-sft-mixture", _TULU_FILE, _TULU_COMMIT, TURNS),
    "flan": HubFile("Muennighoff/flan", "train/{task}_10templates_train.jsonl", _FLAN_COMMIT, FLAN),
    "safe_rlhf": HubFile("PKU-Alignment/PKU-SafeRLHF", "data/Alpaca-7B/train.jsonl", _SAFE_COMMIT, SAFER),
}


def load_pairs(name: str, *, n: int | None = None) -> TextPairs:
    """The first n pairs (None: all) of a data set by name, see the table above.

    Rows with an empty response are left out, with one warning that counts them. Raises ValueError for an unknown
    name, a file of other contents, and an n that is not in 1..(how many there are); DataUnavailable, which says what
    to put where, without a network.
    """
    file = hub_file(name)
    pairs = read_pairs(fetch(file), file.form)
    if n is not None and not 1 <= n <= len(pairs):
        raise ValueError(f"n must lie in 1..{len(pairs)}, what {name} has, got {n}")
    return pairs[:n]


def hub_file(name: str) -> HubFile:
    """The file of a name in the table above, for FLAN of one of its tasks. Raises ValueError for an unknown one."""
    data, _, task = name.partition(":")
    if data not in HUB or (task and "{task}" not in HUB[data].name):
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(HUB)}")
    if "{task}" not in HUB[data].name:
        return HUB[data]
    if task not in FLAN_TASKS:
        raise ValueError(f"{name!r} needs one task, as in {data}:rte; known: {', '.join(FLAN_TASKS)}")
    return replace(HUB[data], name=HUB[data].name.format(task=task))


def find_pairs(name: str) -> Path | None:
    """The file of a name in the table above, from a data folder or the hub's cache; nothing is downloaded. None where
    it is not there, or is parquet and `pyarrow` is not."""
    import huggingface_hub

    file = hub_file(name)
    options = {"repo_type": "dataset", "revision": file.revision}
    cached = huggingface_hub.try_to_load_from_cache(file.repository, file.name, **options)
    found = [*file.places, *([Path(cached)] if isinstance(cached, str) else [])]
    readable = not file.name.endswith(".parquet") or importlib.util.find_spec("pyarrow")
    return next((place for place in found if place.is_file()), None) if readable else None


def read_pairs(path: str | Path, form: Form) -> TextPairs:
    """The rows of a .json (a list of objects), .jsonl (an object a line), .csv (with a header) or .parquet as pairs.

    Numbers become text; an absent or null value is empty. A column "messages", a list of turns with `role` and
    `content`, gives the columns `user` and `assistant`: the first of the user's turns, and the answer to it. Rows with
    an empty response are left out, with one warning that counts them. Raises ValueError naming the file for another
    ending, contents that are not rows, a column that no row has, and a file without a response; FileNotFoundError where
    there is no file, and DataUnavailable for parquet where `pyarrow` is not installed.
    """
    path = Path(path)
    rows = [row | _first_turns(row["messages"]) if "messages" in row else row for row in _rows(path)]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    there = {column for row in rows for column in row}
    for column in form.columns:
        if column not in there:
            raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(sorted(map(str, there)))}")
    texts = [{column: _text(value) for column, value in row.items()} for row in rows]
    texts = [dict.fromkeys(form.columns, "") | row for row in texts]
    kept = [row for row in texts if form.response_of(row).strip()]
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
    path = next((place for place in file.places if place.is_file()), None) or _download(file)
    if file.sha256:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != file.sha256:
            raise ValueError(f"{path} is not the expected file: its sha256 is {found}, expected {file.sha256}")
    return path


def _download(file: HubFile) -> Path:
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
            f"could not be downloaded ({why}). With a network, run again; without one, {file.where_to_put()}"
        ) from error


def _rows(path: Path) -> list[dict]:
    if path.suffix not in (".json", ".jsonl", ".csv", ".parquet"):
        raise ValueError(f"{path} must end in .json, .jsonl, .csv or .parquet, got {path.suffix!r}")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
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


def _parquet_rows(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataUnavailable(f"{path} is parquet, which needs the pyarrow package: install the hub extra") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not PARQUET: {error}") from error


def _first_turns(messages: list[dict] | None) -> dict[str, str]:
    """The first turn of the user and the first of the assistant after it, empty where there is none."""
    found = {"user": "", "assistant": ""}
    for turn in messages or []:
        role = turn.get("role")
        if role in found and not found[role] and (role == "user" or found["user"]):
            found[role] = _text(turn.get("content"))
    return found


def _columns_of(part: str) -> tuple[str, ...]:
    return tuple(name for _, name, _, _ in string.Formatter().parse(part) if name is not None)


def _text(value: object) -> str:
    return "" if value is None else str(value)
