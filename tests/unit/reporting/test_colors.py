"""Contrast and color blindness, computed from the declared colors.

Source: relative luminance and contrast ratio of WCAG 2.2; color blindness by Machado, Oliveira and Fernandes (2009),
severity 1.0; color difference CIE76 in CIELAB (D65).
"""

import re
from itertools import combinations

import numpy as np
import pytest

from ropeway.reporting.colors import DARK, DARK_PLOT, LIGHT, LIGHT_PLOT, MARKERS, MODELS, SERIES
from ropeway.reporting.render import render

MODES = {"light": LIGHT, "dark": DARK}
TEXT, GRAPHIC = 4.5, 3.0  # WCAG 2.2: 1.4.3 and 1.4.11
# Text color -> every background that it appears on in the templates.
BACKGROUNDS = {
    "ink": ("paper", "card", "soft", "read"),
    "dim": ("paper", "card", "soft"),
    "accent": ("card",),
    "warn": ("card",),
    "learn-ink": ("learn",),
    "learn-sign": ("learn",),
    "read-ink": ("read",),
    "read-sign": ("read",),
}
BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
DIFFERENT = 15.0  # CIE76; 2.3 is just noticeable side by side


def linear(color):
    """`#rrggbb` -> `(3,)` linear sRGB."""
    values = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    dark, light = sorted(linear(color) @ TO_XYZ[1] for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


def lab(rgb):
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / (0.95047, 1, 1.08883)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array((116 * y - 16, 500 * (x - y), 200 * (y - z)))


def least_difference(colors, blindness):
    seen = [lab(np.array(BLINDNESS[blindness]) @ linear(color)) for color in colors]
    return min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2))


def test_the_formulas_give_the_published_values():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # WebAIM's example of a pass
    assert lab(linear("#ff0000")) == pytest.approx((53.24, 80.09, 67.20), abs=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_text_has_a_contrast_of_4_5_on_each_of_its_backgrounds(mode):
    colors = MODES[mode]
    ratios = {
        f"{text} on {background}": contrast(colors[text], colors[background])
        for text, backgrounds in BACKGROUNDS.items()
        for background in backgrounds
    }
    assert {pair: round(ratio, 2) for pair, ratio in ratios.items() if ratio < TEXT} == {}


def test_every_text_color_of_the_style_sheet_is_checked_and_none_is_faded():
    css = render("style.css.jinja")
    used = set(re.findall(r"(?<![-\w])color:var\(--([\w-]+)\)", css))
    assert used == BACKGROUNDS.keys()
    assert "opacity" not in css


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_parts_of_a_bar_differ_for_every_kind_of_color_vision(mode, blindness):
    assert least_difference([MODES[mode][f"p{part}"] for part in range(7)], blindness) >= DIFFERENT


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_curves_of_a_plot_differ_for_every_kind_of_color_vision(blindness):
    assert least_difference([*SERIES, MODELS["tuned"]], blindness) >= DIFFERENT
    assert least_difference(list(MODELS.values()), blindness) >= DIFFERENT
    assert len(set(MARKERS)) == len(SERIES)


@pytest.mark.parametrize("theme", [LIGHT_PLOT, DARK_PLOT])
def test_a_plot_is_legible_on_its_background(theme):
    for text in (theme.ink, theme.dim, theme.limit):
        assert contrast(text, theme.background) >= TEXT
    assert contrast(theme.in_row, theme.background) >= GRAPHIC


def test_lines_stand_out_from_white():
    assert min(contrast(color, LIGHT_PLOT.background) for color in (*SERIES, *MODELS.values())) >= GRAPHIC
