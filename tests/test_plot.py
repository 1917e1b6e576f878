"""Pictures: what the terminal shows is what the weights say, and figures hold what they were given."""

import io
import subprocess
import sys

import numpy as np
import pytest

from jattn import masks, plot

WORDS = ["Every", "one", "knows"]
WEIGHTS = np.array([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.05, 0.15, 0.8]])


def test_the_terminal_shows_strength_masks_and_the_strongest_key():
    lines = plot.text_heat_map(WEIGHTS, WORDS, WORDS).splitlines()
    assert lines[-5:-2] == [
        "Every  ██      Every      1.00",
        "one    ▓▓██    one        0.60",
        "knows  ··▒▒██  knows      0.80",
    ]
    assert lines[:5] == ["       E   k", "       v   n", "       e o o", "       r n w", "       y e s   strongest"]
    assert lines[-1] == "·· less  ░░ 0.062  ▒▒ 0.125  ▓▓ 0.250  ██ 0.500 to 1.000   blank 0"


@pytest.mark.parametrize("width", [40, 80, 133])
def test_the_terminal_picture_fits_its_width_and_says_what_it_cut(width):
    words = [f"extraordinarily{i}" for i in range(99)]
    text = plot.text_heat_map(np.full((97, 99), 1 / 99), words[:97], words, width=width)
    assert max(map(len, text.splitlines())) <= max(width, 75)  # 75: the legend
    fit = (width - 31) // 2
    assert f"(cut to fit: {fit} of 97 rows, {fit} of 99 columns)" in text
    assert "cut" not in plot.text_heat_map(WEIGHTS, WORDS, WORDS)


def test_the_terminal_picture_takes_any_letter_and_any_number():
    words = ["日本語", "e\u0301te\u0301", "x"]
    lines = plot.text_heat_map([[0, np.nan, 0], [0, 0, 0], [1e-30, 0, 1]], words, words, shades=".:#").splitlines()
    assert lines[3:6] == [
        "日本語    ??    e\u0301te\u0301        nan",
        "e\u0301te\u0301             (none)",
        "x       ..  ##  x          1.00",
    ]
    assert plot.text_heat_map(np.zeros((0, 0)), [], [])


def test_a_panel_per_head_holds_the_weights():
    figure = plot.heat_map(np.stack([WEIGHTS, WEIGHTS.T]), WORDS, WORDS, title="who $attends")
    *panels, bar = figure.axes
    assert [ax.get_xlabel() for ax in panels] == ["head 0", "head 1"] and bar.get_ylabel() == "share of attention"
    drawn = panels[1].images[0].get_array()
    np.testing.assert_array_equal(drawn.filled(0), WEIGHTS.T)
    np.testing.assert_array_equal(drawn.mask, WEIGHTS.T == 0)
    assert [text.get_text() for text in panels[0].get_yticklabels()] == WORDS
    many = plot.heat_map(np.ones((17, 2, 5)))
    assert len(many.axes) == 16 + 1 and "first 16 of 17" in many.get_suptitle()


def test_a_mask_picture_holds_the_mask():
    mask = masks.Causal() & masks.Window(2, 0)
    (ax,) = plot.mask_picture(mask, 3, 5, q_offset=2).axes
    np.testing.assert_array_equal(ax.images[0].get_array(), mask.to_array(3, 5, q_offset=2))
    assert ax.get_xlabel() == "key position (9 of 15 pairs)"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["2", "3", "4"]
    assert plot.mask_picture(mask, 4).get_suptitle() == str(mask)
    assert len(plot.mask_picture(np.ones((2, 3, 4, 1), bool), 4, 5).axes) == 6


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_same_picture_is_the_same_bytes(kind, start):
    def saved():
        words = ["$x^", "日", "plain"]  # no mathematics, no letter that the font has, and neither warns
        plot.save(plot.heat_map(WEIGHTS, words, words, title="$_"), file := io.BytesIO(), kind)
        return file.getvalue()

    assert saved().startswith(start) and saved() == saved()


@pytest.mark.parametrize(
    ("weights", "said"), [(WEIGHTS[0], r"\[T, S\].*T=3"), (WEIGHTS[:2], r"\(2, 3\)"), (-WEIGHTS, "negative")]
)
@pytest.mark.parametrize("draw", [plot.text_heat_map, plot.heat_map])
def test_wrong_weights_are_refused(draw, weights, said):
    with pytest.raises(ValueError, match=said):
        draw(weights, WORDS, WORDS)


def test_other_mistakes_are_refused():
    with pytest.raises(TypeError, match="boolean"):
        plot.mask_picture(np.ones((3, 3)), 3)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.heat_map(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="width=20"):
        plot.text_heat_map(WEIGHTS, WORDS, WORDS, width=20)


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, jattn.plot as p; p.text_heat_map([[1.0]], 'a', 'a'); sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
