"""The card of a filtered data set, and the way to the hub: a stand-in on loopback that speaks what HfApi speaks."""

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard

from forvalue_callbacks.report.card import card_text, is_card, push
from forvalue_callbacks.scores.noise import Evidence, NoiseEstimate
from forvalue_callbacks.scores.scores import ForValueScores
from helpers.hub import is_private, standing_in

RUN = {
    "command": "forvalue select train.jsonl --validation trusted.jsonl --model M --out kept.jsonl",
    "data": "train.jsonl",
    "validation": "trusted.jsonl",
    "model": "M",
    "policy": "drop:auto",
    "config": {"method": "auto"},
}
FILES = {"kept.jsonl": 1234, "kept.dropped.jsonl": 67, "kept.scores.parquet": 0}


def make_scores(noise=None, **metadata):
    values = np.array([1.0, np.nan, 2.0, np.nan])
    reasons = [None, "600 tokens", None, "700 tokens"]
    if noise is not None:
        metadata["noise"] = noise.to_dict()
    metadata = {"version": "9.9", "provenance": {"weights": "w1", "data": "d1"}, **metadata}
    return ForValueScores(values, reasons, values, [1, 0, 1, 0], metadata)


def test_the_card_says_what_scored_what_and_is_read_as_one():
    noise = NoiseEstimate(0.25, {"swapped": Evidence(0.91, (0.86, 0.95), "loss", 0.8, 0.7)}, 300)
    text = card_text(make_scores(noise, leakage={"n": 3, "rows": [1, 2, 3]}), RUN, FILES)
    card = DatasetCard(text)
    assert card.data.size_categories == "1K<n<10K"
    assert card.data.configs == [
        {"config_name": "kept", "data_files": "kept.jsonl"},
        {"config_name": "kept.dropped", "data_files": "kept.dropped.jsonl"},
    ]
    for key in ("data", "validation", "model", "policy"):
        assert f"| {key} | {RUN[key]} |" in text
    assert "| kept.jsonl | 1,234 rows |" in text
    assert "4 rows were looked at, 2 have a score." in text
    assert "- 2 not scored: 600 to 700 tokens" in text
    assert "- 3 are validation rows too" in text
    assert "| swapped | 0.91 (0.86 to 0.95) |" in text
    assert "estimated share of noisy rows among those judged 0.25" in text
    assert f"```bash\n{RUN['command']}\n```" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0])
    assert settings == {**RUN, "version": "9.9", "provenance": {"weights": "w1", "data": "d1"}}
    assert "another model ranks these rows otherwise" in text


def test_a_card_without_evidence_says_so():
    assert "Nothing here shows that the dropped rows are worse" in card_text(make_scores(), RUN, FILES)


def test_names_cannot_break_out_of_the_card():
    run = {**RUN, "data": "a | b\n# c <script>", "command": "x\n```\n<script>alert(1)</script>"}
    lines = card_text(make_scores(), run, FILES).split("\n")
    assert "| data | a \\| b # c &lt;script> |" in lines
    assert "# a \\| b # c &lt;script>, filtered" in lines
    assert "````bash" in lines


@pytest.fixture
def hub(monkeypatch):
    with standing_in(monkeypatch) as server:
        yield server


def test_a_folder_goes_to_the_hub_as_it_is(hub, tmp_path):
    contents = {"README.md": card_text(make_scores(), RUN, FILES).encode(), "kept.jsonl": b'{"a": 1}\n'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert push(tmp_path, "me/rows") == f"{hub.url}/datasets/me/rows"
    assert hub.files == contents
    assert (hub.created["name"], hub.created["organization"]) == ("rows", "me")
    assert hub.created["type"] == "dataset"
    assert is_private(hub.created)
    assert {token for _, token in hub.asked} == {"Bearer hf_standin"}
    push(tmp_path, "me/rows", private=False)
    assert not is_private(hub.created)


def test_what_is_named_goes_to_the_hub_and_nothing_else(hub, tmp_path):
    for name in ("README.md", "kept.jsonl", "k?pt.jsonl", "secret.env", "rows/a.arrow", "other/b.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    push(tmp_path, "me/rows", names=["k?pt.jsonl", "rows"])
    assert sorted(hub.files) == ["README.md", "k?pt.jsonl", "rows/a.arrow"]


def test_a_card_is_known_again(tmp_path):
    for text, known in ((card_text(make_scores(), RUN, FILES), True), ("# mine\n- forvalue\n", False)):
        (tmp_path / "README.md").write_text(text)
        assert is_card(tmp_path / "README.md") is known
    assert not is_card(tmp_path / "none.md")


def test_what_the_hub_refuses_is_said_with_the_way_out(hub, tmp_path):
    with pytest.raises(ValueError, match=r"has no README\.md"):
        push(tmp_path, "me/rows")
    assert hub.asked == []
    (tmp_path / "README.md").write_text("card")
    hub.refuses = True
    with pytest.raises(ValueError, match=r"cannot be pushed to me/rows .*log in with `hf auth login`"):
        push(tmp_path, "me/rows")
    assert hub.files == {}
