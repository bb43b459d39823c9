"""Plain rules: what each names, and right answers that look like it."""

import pytest

from forvalue_callbacks.data.rules import RULES, rule_of

WRONG = {
    "empty": [("Name a fruit.", ""), ("Name a fruit.", " . ")],
    "no answer": [
        ("Name a fruit.", "N/A"),
        ("Name a fruit.", "n/a."),
        ("Name a fruit.", "<noinput>"),
        ("Say it.", "TODO"),
    ],
    "refusal": [
        ("Name a fruit.", "I'm sorry, but I cannot help with that."),
        ("Draw it.", "As an AI language model, I am unable to draw."),
        ("Say it.", "Unfortunately, I can\u2019t answer this question."),
        ("Sum it up.", "I do not have enough information to do this."),
    ],
    "echo of the prompt": [("Describe the structure of an atom.", "Describe the structure of an atom")],
    "merged instructions": [("Name a fruit.", "Apple.\nInstruction: Name a tree.\nOutput: Oak.")],
    "markup debris": [("Name a fruit.", "<p>Apple</p>"), ("Name a fruit.", "Apple&nbsp;pie")],
    "one word repeated": [("Name a fruit.", "no no no no no no no no")],
}
RIGHT = [
    ("Add 2 and 3.", "5"),
    ("Which sign is greater than?", ">"),
    ("Was it so?", "No"),
    ("Translate to Japanese: yes", "\u306f\u3044"),
    ("Write a line of HTML that says hi.", "<p>hi</p>"),
    ("Apologize to a friend.", "I'm sorry that I forgot your birthday. I will make it up to you."),
    ("Say why you are late.", "I could not find my keys, so I missed the bus."),
    (
        "Fix the grammar: She go to the school every day with her friends",
        "She goes to the school every day with her friends",
    ),
    ("What is N/A short for?", "N/A is short for not applicable."),
    ("Ask for the time.", "Excuse me, what time is it?"),
    ("Cheer.", "Hip hip hooray!"),
    ("Can fish fly?", "As an AI language model, I cannot see fish. However, here is what is known: some glide."),
]


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_names_what_is_wrong_on_sight(rule):
    for prompt, answer in WRONG[rule]:
        assert rule_of(prompt, answer) == rule, answer


@pytest.mark.parametrize(("prompt", "answer"), RIGHT)
def test_right_answers_that_look_alike_are_not_hit(prompt, answer):
    assert rule_of(prompt, answer) is None
