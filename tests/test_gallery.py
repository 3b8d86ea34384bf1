"""The gallery: what the page holds, and what a browser shows of it."""

import base64
import gzip
import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from test_score_file import TEXTS

from tda_core.gallery import gallery, main
from tda_core.score_file import About, Items, ScoreFile
from tda_core.score_import import from_package

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def a_file(method="stride", q=3, n=40, seed=0, **items):
    generator = torch.Generator().manual_seed(seed)
    texts = [*TEXTS, *(f"document number {i} tells of apples and pears" for i in range(n - len(TEXTS)))]
    train = Items(tuple(f"t{i}" for i in range(n)), tuple(texts), tuple("web" if i % 2 else "book" for i in range(n)))
    queries = Items(
        tuple(f"q{i}" for i in range(q)), tuple(f"who tells of {w} ?" for w in ("apples", "plums", "pears")[:q])
    )
    parts = {"train": train, "queries": queries} | items
    return ScoreFile(torch.randn(q, n, generator=generator), About(method, "loss", damping=0.5), **parts)


def held(page):
    """What the page holds, read as its script does."""
    packed = re.search(r'id="data">([^<]*)</script>', page).group(1)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def seen(page, folder, view="", size="1200,900"):
    """The document as a browser has it once the page is ready, without what is inside style and script; its errors."""
    path = folder / "gallery.html"
    path.write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--virtual-time-budget=5000"]
    flags += [
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        f"{path.as_uri()}#{view}",
    ]
    done = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=60, check=True)
    body = re.sub(r"(?s)<(style|script)\b.*?</\1>", "", done.stdout)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return body, errors


def cards(body, method):
    """(score as shown, id) of each example under a method."""
    section = body.split(f'<section class="method" aria-label="{method}">')[1].split("</section>")[0]
    pattern = r'<span class="score">([^<]*)</span><span>([^<]*)</span>'
    return [(score, html.unescape(name)) for score, name in re.findall(pattern, section)]


# what the page holds


def test_the_strongest_of_each_sign_are_kept():
    files = [a_file(), a_file("icp", seed=1)]
    data = held(gallery(files, strongest=4))
    for file, method in zip(files, data["methods"], strict=True):
        assert method["name"] == file.about.method and "damping 0.5" in method["about"]
        for i in range(3):
            names = [data["train"]["ids"][k] for k in method["examples"][i]]
            order = file.scores[i].argsort(descending=True).tolist()
            assert names == [f"t{k}" for k in order[:4] + order[-4:]]
            expected = [float(file.scores[i, k]) for k in order[:4] + order[-4:]]
            assert method["scores"][i] == pytest.approx(expected, rel=1e-6)
    used = {name for m in data["methods"] for row in m["examples"] for name in row}
    assert used == set(range(len(data["train"]["ids"]))), "no example is in the page that no list names"


def test_few_examples_are_kept_once_and_zeros_never():
    scores = torch.tensor([[0.0, 2.0, -1.0, 0.0, 3.0]])
    file = ScoreFile(scores, About("m", "loss"), Items.numbered(5), Items.numbered(1))
    data = held(gallery([file], strongest=3))
    assert [data["train"]["ids"][k] for k in data["methods"][0]["examples"][0]] == ["4", "1", "2"]
    nothing = ScoreFile(0 * scores, About("m", "loss"), Items.numbered(5), Items.numbered(1))
    assert held(gallery([nothing]))["methods"][0]["scores"] == [[]]


def test_files_in_another_order_are_put_in_the_firsts():
    file = a_file()
    other = a_file("icp").select(["q2", "q0", "q1"], list(reversed(file.train.ids)))
    one, two = held(gallery([file, other]))["methods"]
    assert one["examples"] == two["examples"] and one["scores"] == two["scores"]


def test_no_text_can_end_the_data_or_the_title():
    page = gallery([a_file()], title="</title><script>alert(1)</script>$data")
    assert "<script>alert" not in page and page.count("<script") == 2
    assert held(page)["train"]["texts"][held(page)["train"]["ids"].index("t0")] == TEXTS[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gallery([]), "at least one score file, got none"),
        (lambda: gallery([a_file(), a_file()]), "two files are of the method 'stride'"),
        (lambda: gallery([a_file()], strongest=0), "strongest must be at least 1, got 0"),
        (lambda: gallery([a_file(), a_file("icp").select(["q0", "q1"])]), "different queries: 'q2' is in one alone"),
        (lambda: gallery([a_file(), a_file("icp", queries=Items.numbered(3, "x"))]), "different queries"),
        (lambda: gallery([a_file(), a_file("icp", n=41)]), "different training examples: 't40' is in one alone"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_command(tmp_path, capsys):
    a_file().save(tmp_path / "a.safetensors")
    a_file("icp", seed=1).save_blocks(tmp_path / "b", 2)
    words = [str(tmp_path / "a.safetensors"), str(tmp_path / "b"), "-o", str(tmp_path / "g.html"), "--title", "Mine"]
    assert main(words) == 0 and "<h1>Mine</h1>" in (tmp_path / "g.html").read_text()
    (tmp_path / "g.html").write_text("old")
    assert main(words) == 1 and "is there already" in capsys.readouterr().err
    assert (tmp_path / "g.html").read_text() == "old"
    assert main([*words, "--force"]) == 0 and (tmp_path / "g.html").read_text() != "old"
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "h.html")]) == 1
    assert "none" in capsys.readouterr().err and not (tmp_path / "h.html").exists()


# what a browser shows


@needs_browser
def test_the_page_shows_what_the_files_say(tmp_path):
    files = [a_file(), a_file("icp", seed=1)]
    body, errors = seen(gallery(files), tmp_path, "q=q2")
    assert errors == [] and 'data-ready="yes"' in body
    assert "who tells of pears ?" in body and "3 queries, 40 training examples, 2 methods" in body
    for file in files:
        shown, row = cards(body, file.about.method), file.scores[2]
        order = row.argsort(descending=True).tolist()
        expected = order[:8] + list(reversed(order))[:8]  # eight of each sign are open
        assert [name for _, name in shown] == [f"t{k}" for k in expected]
        assert [float(score) for score, _ in shown] == pytest.approx([float(row[k]) for k in expected], rel=5e-4)
    assert "<mark>tells</mark>" in body and "<mark>pears</mark>" in body and "<mark>apples</mark>" not in body


@needs_browser
def test_links_reopen_filters_and_searches(tmp_path):
    file = a_file()
    body, errors = seen(gallery([file]), tmp_path, "q=q1&sign=opponents&source=web&words=number&find=plum")
    assert errors == [] and "1 of 3 queries" in body
    kept = [k for k in file.scores[1].argsort().tolist() if file.scores[1, k] < 0 and k % 2 and k >= len(TEXTS)]
    assert [name for _, name in cards(body, "stride")] == [f"t{k}" for k in kept[:8]]
    assert ">Proponents<" not in body
    body, _ = seen(gallery([file]), tmp_path, "q=absent&source=none&sign=sideways")
    assert "who tells of apples ?" in body and ">Proponents<" in body and ">Opponents<" in body


@needs_browser
def test_documents_of_all_kinds_are_text(tmp_path):
    """Scripts, nothing, right to left, NUL, half a character, and 100 kB."""
    texts = (*TEXTS, "long " * 20_000)
    train = Items.numbered(len(texts))
    file = ScoreFile(torch.arange(1.0, 7).view(1, 6), About("m", "loss"), Items(train.ids, texts), Items(("<b>q</b>",)))
    body, errors = seen(gallery([file]), tmp_path, size="390,844")
    assert errors == [] and len(cards(body, "m")) == 6
    assert "<script>alert" not in body and html.escape("<script>alert(1)</script>") in body
    assert "(empty)" in body and 'dir="auto"' in body and body.count("long ") >= 20_000 and "<b>q</b>" not in body


@needs_browser
def test_pictures_are_drawn_and_no_texts_are_needed(tmp_path):
    images = torch.arange(4 * 2 * 3, dtype=torch.uint8).view(4, 2, 3)
    coloured = images[:2].unsqueeze(3).repeat(1, 1, 1, 3)
    train, queries = Items(tuple("abcd"), images=images), Items(("q0", "q1"), images=coloured)
    file = ScoreFile(torch.eye(2, 4) - 0.1, About("m", "loss"), train, queries)
    body, errors = seen(gallery([file]), tmp_path, "q=q1")
    assert errors == [] and body.count("<canvas") == 2 + 1 + 4 and cards(body, "m")[0] == ("0.9000", "b")


@needs_browser
def test_only_queries_in_view_are_in_the_page(tmp_path):
    n = 100_000
    queries = Items(tuple(f"q{i}" for i in range(n)), tuple(f"question number {i}" for i in range(n)))
    file = ScoreFile(torch.ones(n, 1), About("m", "loss"), Items(("t",), ("x",)), queries)
    body, errors = seen(gallery([file]), tmp_path, "q=q99999")
    assert errors == [] and "100,000 of 100,000 queries" in body and body.count('role="option"') < 60
    assert "question number 99999" in body


@needs_browser
def test_scores_of_another_package_open_after_one_call(tmp_path):
    matrix = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).numpy()  # training examples first
    file = from_package(matrix, About("traker", "margin"), sign="proponents_positive")
    body, errors = seen(gallery([file]), tmp_path)
    best = int(matrix[:, 0].argmax())
    assert errors == [] and cards(body, "traker")[0][1] == str(best)
    assert float(cards(body, "traker")[0][0]) == pytest.approx(float(matrix[best, 0]), rel=1e-3)
