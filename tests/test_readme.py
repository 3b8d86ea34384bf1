"""The README's code runs as printed, and its links lead somewhere."""

import re

import torch
from language_toys import language_model

from tda_core import paths
from tda_core.gallery import main as gallery_of
from tda_core.score_file import ScoreFile


def test_the_code_attributes_a_model(tmp_path, monkeypatch):
    first, of_language, of_documents, of_scores, second, third = re.findall(
        r"```python\n(.*?)```", paths.README.read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    torch.manual_seed(0)
    exec(first, names)
    assert names["scores"].shape == (4, 200)
    # a query that is itself a training example is its own proponent
    assert all(int(i) in names["proponents"][i] for i in range(4))
    of_names = dict(names)
    assert len([line for line in of_language.splitlines() if line]) <= 10
    vocabulary = [word for word in re.findall(r"\w+", of_language) if word not in ("unk", "s")]
    toy = language_model(words=sorted(set(vocabulary)))
    toy.save("model")
    exec(of_language.replace("EleutherAI/pythia-70m", "model"), of_names)
    assert of_names["scores"].shape == (1, 2)
    assert sorted(of_names["proponents"][0].tolist()) == [0, 1]
    assert len([line for line in of_documents.splitlines() if line]) <= 10
    exec(of_documents, of_names)
    assert of_names["closed"].shape == of_names["recovered"].shape == (1, 2)
    exec(of_scores, of_names)
    assert ScoreFile.load("stride.safetensors").scores.equal(of_names["recovered"])
    assert gallery_of(["stride.safetensors", "-o", "gallery.html"]) == 0
    exec(second, names)
    assert 0 in names["top"].proponents and names["top"].proponents.shape == (1, 5)
    assert names["index"].dtype == "int8" and names["index"].ids.tolist() == list(range(3, 202))
    exec(third, names)
    assert names["scores"].shape == names["closed"].shape == (4, 200)
    assert all(float(names["closed"][i, i]) > 0 for i in range(4))


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", paths.README.read_text())
    assert any(target.endswith(".png") for target in targets)
    missing = [t for t in targets if not t.startswith("http") and not (paths.ROOT / t).is_file()]
    assert missing == []


def test_layout_names_exist():
    named = re.findall(r"`((?:tda_core|notebooks|papers)/[\w/.]+)`", paths.README.read_text())
    assert len(named) > 5
    assert [n for n in named if not (paths.ROOT / n).exists()] == []
