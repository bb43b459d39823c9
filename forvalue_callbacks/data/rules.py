"""Plain rules for answers that are wrong on sight: each has a name, and says so seldom of a right answer.

They read text. What they hit they name; whether that counts against a row is for the method to say, since validation
rows that hit the same rule as often make it a habit of the data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

# An answer of fewer characters is too short for a rule that looks at repetition or at an echo.
ENOUGH = 24
# Refusals are short, and begin as such.
LONGEST_REFUSAL, LATEST_REFUSAL = 400, 12

_NOTHING = re.compile(
    r"(n\s*/\s*a|n\.a\.|null|nan|tbd|todo|fixme|undefined|no (answer|output|response|input)|"
    r"not (applicable|available)|no ?input|"
    r"<no ?(input|output|answer)>|\[?(blank|empty|insert .{0,20} here|placeholder)\]?)[.!]?",
    re.IGNORECASE,
)
_CANNOT = (
    r"(can(not|'t| not)|could not|couldn't|am (not able|unable)|am not (capable|programmed)|won't be able|"
    r"(do not|don't) have (the ability|access|enough|sufficient))"
)
_REFUSAL = re.compile(
    rf"as an? (ai|artificial intelligence|language model)\b.{{0,40}}\bi {_CANNOT}|"
    rf"(i'?m |i am )?(very |so |really )?(sorry|(i )?apologi[sz]e|unfortunately|regret)\W.{{0,60}}?\bi {_CANNOT}\b|"
    rf"(sorry|unfortunately),? (i|we|this|that) {_CANNOT}\b|"
    rf"i {_CANNOT} (to )?(\w+ )?(help|assist|answer|fulfil|fulfill|comply|complete|provide|respond|do this|do that|"
    rf"generate|process|perform|information|data|context)",
    re.IGNORECASE,
)
_ANSWERS_ALL_THE_SAME = re.compile(r"\b(however|nevertheless|here (is|are)|here\'s)\b", re.IGNORECASE)
_HTML = re.compile(
    r"</(p|div|span|a|b|i|li|ul|ol|td|tr|table|h[1-6]|font|script|body|html|strong|em)>|&(nbsp|amp|quot|lt|gt|#\d+);|"
    r"<br ?/?>|\{\{[^{}]{1,40}\}\}|\{%[^%]{1,60}%\}",
    re.IGNORECASE,
)
_MARKUP_ASKED = re.compile(r"html|xml|markup|\btags?\b|template|web ?page|jinja|css|<\w+|</|\{\{|&\w+;", re.IGNORECASE)
_MERGED = re.compile(
    r"(?:^|\n)\W{0,4}(?:instruction|output|response|user|human|assistant)\s*\d*\s*:\s*\S", re.IGNORECASE
)


def rule_of(prompt: str, answer: str) -> str | None:
    """The name of the first rule that an answer hits, None where there is none."""
    return next((name for name, hit in RULES.items() if hit(prompt, answer)), None)


def _empty(prompt: str, answer: str) -> bool:
    return not any(c.isalnum() for c in answer) and not _has_sign(answer)


def _has_sign(answer: str) -> bool:
    """A sign that may be an answer: of mathematics, of another script, an emoji."""
    return any(c in "+-*/=<>%$#@&|^~?!" or ord(c) > 127 for c in answer.strip().strip("-._ \n"))


def _nothing(prompt: str, answer: str) -> bool:
    return _NOTHING.fullmatch(answer.strip().strip("\"'()")) is not None


def _refusal(prompt: str, answer: str) -> bool:
    answer = answer.strip().replace("\u2019", "'")
    found = None if len(answer) > LONGEST_REFUSAL or _ANSWERS_ALL_THE_SAME.search(answer) else _REFUSAL.search(answer)
    return found is not None and found.start() < LATEST_REFUSAL


def _echo(prompt: str, answer: str) -> bool:
    said, asked = _plain(answer), _plain(prompt)
    return len(said) >= ENOUGH and said in asked and len(said) >= 0.8 * len(asked)


def _merged(prompt: str, answer: str) -> bool:
    found = _MERGED.search(answer)
    return found is not None and found.start() > 0 and len(_MERGED.findall(answer)) >= 2


def _debris(prompt: str, answer: str) -> bool:
    return _HTML.search(answer) is not None and _MARKUP_ASKED.search(prompt) is None and "def " not in answer


def _one_word(prompt: str, answer: str) -> bool:
    words = _plain(answer).split()
    return len(words) >= 6 and Counter(words).most_common(1)[0][1] > 0.8 * len(words)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


RULES: dict[str, Callable[[str, str], bool]] = {
    "empty": _empty,
    "no answer": _nothing,
    "refusal": _refusal,
    "echo of the prompt": _echo,
    "merged instructions": _merged,
    "markup debris": _debris,
    "one word repeated": _one_word,
}
