"""Equations of docstrings as HTML: scripts, italics, columns; and nothing of a docstring is lost or let through."""

from __future__ import annotations

import html
import re

import pytest

from etude import catalog
from etude.core.report.mathematics import expression, typeset


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x_i", "<i>x</i><sub><i>i</i></sub>"),
        ("h_{t−1}", "<i>h</i><sub><i>t</i>−1</sub>"),
        ("∇_θ L_i", "∇<sub>θ</sub> <i>L</i><sub><i>i</i></sub>"),
        ("λ_max(H)", "λ<sub>max</sub>(<i>H</i>)"),
        ("argmin_θ R", "argmin<sub>θ</sub> <i>R</i>"),
        ("R^T + w^{t+1}", "<i>R</i><sup><i>T</i></sup> + <i>w</i><sup><i>t</i>+1</sup>"),
        ("max_{π'_i} u", "max<sub>π&#x27;<sub><i>i</i></sub></sub> <i>u</i>"),
        ("learning_rate, non_saturating", "learning_rate, non_saturating"),
        ("a step, `x_i`, *not* this", "a step, <code>x_i</code>, <em>not</em> this"),
        ("p < q & r", "<i>p</i> &lt; <i>q</i> &amp; <i>r</i>"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
    ],
)
def test_an_expression(text: str, shown: str) -> None:
    assert expression(text) == shown


def test_lines_with_gaps_become_columns() -> None:
    made = typeset("with D units\n    linear   s     both\n    relu     2s    half\n    then prose\nand more")
    assert made.count("<tr>") == 2
    assert "<td>linear</td><td><i>s</i></td><td>both</td>" in made
    assert '<div class="in">then prose</div>' in made


@pytest.mark.parametrize("name", catalog.entries())
def test_no_letter_of_a_docstring_is_lost(name: str) -> None:
    """Without its tags, and without marks and spaces, the equation is the docstring's."""
    text = catalog.find(name).contract.get("Equation", "")
    bare = html.unescape(re.sub(r"<[^>]+>", "", typeset(text)))
    squeezed = [re.sub(r"[\s_^{}`*]", "", part) for part in (bare, text)]
    assert squeezed[0] == squeezed[1]
