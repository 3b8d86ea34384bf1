"""Score files: what goes in comes out, blocks are one matrix, and what does not belong is refused."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core import score_file
from tda_core.score_file import BLOCKS, About, Items, ScoreFile, main
from tda_core.score_import import QUERY_AXIS, from_package
from tda_core.store import CorruptFile, load_tensors, save_tensors
from tda_core.text_pairs import TextPairs

TEXTS = (
    "<script>alert(1)</script>",
    "",
    "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}",
    "nul \0 inside",
    "\ud800 alone",
)


def a_file(q=4, n=5, **about):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(q, n, generator=generator)
    images = torch.randint(0, 256, (n, 3, 2), generator=generator, dtype=torch.uint8)
    train = Items(
        tuple(f"t{i}" for i in range(n)), TEXTS[:n], tuple("web" if i % 2 else "book" for i in range(n)), images
    )
    pairs = TextPairs(tuple(f"ask {i}" for i in range(q)), tuple(f" answer {i}" for i in range(q)))
    given = {"method": "stride", "target": "loss", "damping": 0.1, "parameters": {"K": 32}, "model": "abc"} | about
    return ScoreFile(scores, About(**given), train, Items.of_texts(pairs, prefix="q"))


def of_matrix(scores, q, n):
    return ScoreFile(scores, About("m", "loss"), Items.numbered(n), Items.numbered(q))


def same(one, other):
    assert torch.equal(one.scores, other.scores) and one.about == other.about
    for a, b in ((one.train, other.train), (one.queries, other.queries)):
        assert (a.ids, a.texts, a.sources) == (b.ids, b.texts, b.sources)
        assert (a.images is None) == (b.images is None) and (a.images is None or torch.equal(a.images, b.images))


def test_what_goes_in_comes_out(tmp_path):
    file = a_file()
    file.save(tmp_path / "scores.safetensors")
    same(ScoreFile.load(tmp_path / "scores.safetensors"), file)
    assert file.queries.texts[1] == "ask 1 answer 1" and file.queries.ids[1] == "q1"


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_blocks_are_one_matrix(tmp_path, rows):
    file = a_file(q=7)
    file.save_blocks(tmp_path / "blocks", rows)
    assert len(list((tmp_path / "blocks").glob(BLOCKS))) == -(-7 // rows)
    same(ScoreFile.load(tmp_path / "blocks"), file)
    file.save_blocks(tmp_path / "blocks", 7, force=True)  # fewer, and none of the old ones is left
    same(ScoreFile.load(tmp_path / "blocks"), file)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=8))
def test_any_texts_survive(texts):
    packed = score_file._packed("x", texts)
    assert score_file._unpacked(packed, "x") == tuple(texts)


def test_others_can_read_it_by_the_documented_format(tmp_path):
    file = a_file()
    file.save(tmp_path / "s.safetensors")
    data = (tmp_path / "s.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors, about = safetensors.torch.load(data), json.loads(header["tda"])
    assert about["kind"] == "scores" and about["version"] == 1 and about["sign"] == "proponents_positive"
    assert about["rows"] == [0, 4, 4] and about["about"]["parameters"] == {"K": 32}
    ends = [0, *tensors["train_texts.ends"].tolist()]
    second = bytes(tensors["train_texts.bytes"].numpy())[ends[2] : ends[3]]
    assert second.decode() == TEXTS[2] and torch.equal(tensors["scores"], file.scores)


def test_some_by_their_ids():
    file = a_file()
    some = file.select(["q2", "q0"], ["t4", "t1"])
    assert torch.equal(some.scores, file.scores[[2, 0]][:, [4, 1]])
    assert some.train.texts == (TEXTS[4], TEXTS[1]) and some.train.sources == ("book", "web")
    assert torch.equal(some.train.images, file.train.images[[4, 1]])
    with pytest.raises(ValueError, match=r"unknown query 'q9' \(1 of 2\); known are 'q0', 'q1', 'q2'"):
        file.select(["q1", "q9"])
    with pytest.raises(ValueError, match="unknown training example 'x'"):
        file.select(train=["x"])


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        a_file().save(path)
    assert path.read_text() == "mine"
    a_file().save(path, force=True)
    same(ScoreFile.load(path), a_file())
    with pytest.raises(FileExistsError, match="is there already"):
        a_file().save_blocks(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "holds no scores, but other"),
        ({"version": 2}, "is of version 2, and this reader knows up to 1"),
        ({"sign": "proponents_negative"}, "has sign 'proponents_negative', expected 'proponents_positive'"),
        ({"rows": [0, 4, 9]}, "ends at query 4 of 9: a block is missing"),
        ({"rows": [2, 6, 6]}, "begins at query 2, but expected 0"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, changes, message):
    path = tmp_path / "s.safetensors"
    a_file().save(path)
    tensors, header = load_tensors(path)
    save_tensors(path, tensors, header | changes)
    with pytest.raises(ValueError, match=message):
        ScoreFile.load(path)


def test_truncated_and_missing_blocks_are_refused(tmp_path):
    file = a_file(q=6)
    file.save_blocks(tmp_path / "whole", 2)
    blocks = sorted((tmp_path / "whole").glob(BLOCKS))
    for k, message in enumerate(
        ["names no training examples: is the first", "begins at query 4, but expected 2", "of 6"]
    ):
        shutil.copytree(tmp_path / "whole", tmp_path / str(k))
        (tmp_path / str(k) / blocks[k].name).unlink()
        with pytest.raises(ValueError, match=message):
            ScoreFile.load(tmp_path / str(k))
    blocks[1].write_bytes(blocks[1].read_bytes()[:-5])
    with pytest.raises(CorruptFile, match="block-00001"):
        ScoreFile.load(tmp_path / "whole")
    a_file(q=6, method="icp").save_blocks(tmp_path / "other", 2)
    shutil.copy(tmp_path / "other" / blocks[1].name, blocks[1])
    with pytest.raises(ValueError, match="are of different runs"):
        ScoreFile.load(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="no blocks of scores"):
        ScoreFile.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        ScoreFile.load(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        file.save_blocks(tmp_path / "none", 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of_matrix(torch.ones(2, 3), 3, 2), r"\(queries, training examples\) = \(3, 2\), got \(2, 3\)"),
        (lambda: of_matrix(torch.tensor([[1, float("nan")]]), 1, 2), "of query '0' and training example '1' is nan"),
        (lambda: Items(()), "at least one id"),
        (lambda: Items(("a", "b", "a")), "ids must differ, got 'a' twice"),
        (lambda: Items(("a",), ("x", "y")), "1 ids, but 2 texts"),
        (lambda: Items(("a",), (3,)), "texts must be a list of texts, got 3"),
        (lambda: Items("a"), "ids must be a list of texts"),
        (lambda: Items(("a",), images=torch.ones(1, 2, 2)), r"images must be uint8 \(1, height, width\[, 3\]\)"),
        (lambda: Items(("a",), images=torch.ones(1, 2, 2, 4, dtype=torch.uint8)), "images must be uint8"),
        (lambda: About("", "loss"), "method must be a name, got ''"),
        (lambda: About("m", "loss", parameters={"x": object()}), "parameters must be what JSON can hold"),
        (lambda: About("m", "loss", parameters={"x": float("nan")}), "parameters must be what JSON can hold"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("package", QUERY_AXIS)
@pytest.mark.parametrize("sign", ["proponents_positive", "proponents_negative"])
def test_matrices_of_packages(package, sign):
    expected = a_file().scores
    given = expected if sign == "proponents_positive" else -expected
    matrix = (given if package == "kronfluence" else given.T).numpy()
    file = from_package(matrix, About(f"{package}/mine", "loss", damping=0.5), sign=sign, train=a_file().train)
    assert torch.equal(file.scores, expected) and file.about.damping == 0.5 and file.queries.ids == ("0", "1", "2", "3")
    assert file.train.texts == a_file().train.texts


def test_kronfluences_modules_are_summed():
    parts = {"a": torch.ones(2, 3), "b": torch.arange(6.0).view(2, 3)}
    file = from_package(parts, About("kronfluence", "loss"), sign="proponents_positive")
    assert torch.equal(file.scores, parts["a"] + parts["b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"about": About("captun", "loss")},
            "unknown package 'captun', expected one of traker, dattri",
        ),
        ({"sign": "positive"}, "sign must be one of proponents_positive, proponents_negative, got 'positive'"),
        ({"matrix": np.ones(3)}, r"two axes, got shape \(3,\)"),
        ({"matrix": {}}, "must not be empty"),
        ({"matrix": np.full((2, 2), np.inf)}, "is inf: scores must be finite"),
    ],
)
def test_bad_matrices(changes, message):
    good = {"matrix": np.ones((2, 2)), "about": About("traker", "margin"), "sign": "proponents_positive"}
    with pytest.raises(ValueError, match=message):
        from_package(**good | changes)


def test_files_are_described(tmp_path, capsys):
    file = a_file()
    file.save(tmp_path / "s.safetensors")
    assert main([str(tmp_path / "s.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "stride: scores of 4 queries and 5 training examples, positive for proponents" in said
    assert "damping: 0.1" in said and "training examples: ids, texts, sources, images; 't0' to 't4'" in said
    assert main(["--json", str(tmp_path / "s.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == {"K": 32}
    assert main([str(tmp_path / "absent"), str(tmp_path / "s.safetensors")]) == 1
    both = capsys.readouterr()
    assert "absent" in both.err and "stride" in both.out
