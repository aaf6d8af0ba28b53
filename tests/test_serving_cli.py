"""`recbole-dpr recommend`: the table, and every wrong argument in one line."""

import pytest

from recbole_dpr import load
from recbole_dpr.cli import main
from recbole_dpr.serving.terminal import mark


def table_of(capsys, *arguments):
    """The table's rows below its head, cells by column; and all that was said."""
    assert main(["recommend", *map(str, arguments)]) == 0
    said = capsys.readouterr().out
    return said.splitlines()[said.splitlines().index(next(line for line in said.splitlines() if line.startswith("--"))) + 1 :], said


def test_both_lists_side_by_side_with_moves(tiny_model, capsys):
    rows, said = table_of(capsys, tiny_model, "--history=i3,i14,i15", "--prompt=a western, but no horror", "--k=4")
    rec = load(tiny_model)
    found = rec.recommend(["i3", "i14", "i15"], "a western, but no horror", k=4, explain=True)
    plain = rec.recommend(["i3", "i14", "i15"], k=4)
    assert len(rows) == 4
    for row, before, item, move, rank in zip(rows, plain.items, found.items, found.moves, found.plain_ranks):
        assert row.index(f"[{before}]") < row.index(f"[{item}]", row.index(f"[{before}]") + 1)
        assert mark(move, rank) in row
    assert "wanted: a western" in said and "avoided: horror" in said


def test_marks():
    assert [mark(12, 13), mark(-1, 2), mark(0, 3)] == ["▲ 12 (from 13)", "▼ 1 (from 2)", ""]


def test_a_known_user_and_a_new_one(tiny_model, capsys):
    rec = load(tiny_model)
    for arguments, history in ((["--user=u7"], rec.history("u7")), ([], [])):
        rows, said = table_of(capsys, tiny_model, *arguments)
        assert [row.split("[")[1].split("]")[0] for row in rows] == rec.recommend(history).items
        assert "moved" not in said


def test_strength(tiny_model, capsys):
    _, said = table_of(capsys, tiny_model, "--user=u7", "--prompt=a western", "--strength=0")
    assert "▲" not in said and "▼" not in said
    assert "▲" in table_of(capsys, tiny_model, "--user=u7", "--prompt=a western", "--strength=2")[1]


def test_values_are_text_where_they_are_words_or_ids(tiny_model, capsys):
    """--prompt=yes is no truth value, and 007 no octal number."""
    _, said = table_of(capsys, tiny_model, "--history=007", "--prompt=yes")
    assert "wanted: yes" in said and "skipped: 007" in said


@pytest.mark.parametrize("prompt", ["", " ", 10_000 * "x", "🎬🤠🎬", "فيلم كوميدي بلا رعب", "<script>alert(1)</script>"])
def test_odd_prompts_get_a_table(tiny_model, capsys, prompt):
    assert main(["recommend", str(tiny_model), "--user=u7", f"--prompt={prompt}"]) == 0
    out, told = capsys.readouterr()
    assert sum(" [i" in line for line in out.splitlines()) == 10
    assert ("cut after 1,000" in out + told) == (len(prompt) > 1000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "folder of a finished run"),
        (["--user=u7"], "folder of a finished run"),
        (["/no/such"], "model.json is missing"),
        (["MODEL", "--user=nobody"], "unknown user 'nobody'"),
        (["MODEL", "--user=u7", "--history=i1"], "one of them"),
        (["MODEL", "--k=0"], "k=0"),
        (["MODEL", "--strength=much"], "strength='much'"),
        (["MODEL", "--promt=x"], "--prompt"),
        (["MODEL", "--prompt_encoder=/no/such"], "prompt_encoder"),
        (["MODEL", "--intent_router=taggr"], "tagger"),
        (["MODEL", "--intent_router=nli", "--intent_model=/no/such"], "intent_model"),
    ],
)
def test_wrong_arguments(tiny_model, capsys, arguments, said):
    assert main(["recommend", *(str(tiny_model) if a == "MODEL" else a for a in arguments)]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
