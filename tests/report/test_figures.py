"""Plots hold the numbers that they were given."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from flows.config import Config
from flows.report.figures import Curve, Point, curves, plane, standalone
from flows.report.page import STYLE_SHEET, TEMPLATES, _training_figures
from tests.report.made_up_run import STEPS, training_metrics

WRITTEN_DIGITS = 1e-6
"""Coordinates are written with six decimals."""
SIMPLIFICATION_POINTS = 1 / 9
"""A long line may be drawn with fewer points, none of which is off by more than this part of a pixel."""
BASELINES = {"unigram": 3.08, "xz -9": 2.2}


def element(svg: str, name: str) -> ElementTree.Element:
    found = [one for one in ElementTree.fromstring(svg).iter() if one.get("id") == name]
    assert len(found) == 1, name
    return found[0]


def drawn(svg: str, name: str) -> NDArray[np.float64]:
    """Corners [N, 2] of a line."""
    path = next(one for one in element(svg, name).iter() if one.tag == "path" and "clip-path" in one.attrib)
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"]), float)


def assert_affine(pixels: NDArray[np.float64], values: NDArray[np.float64], tolerance: float) -> None:
    slope, offset = np.polyfit(values, pixels, 1)
    assert abs(slope) > 0
    np.testing.assert_allclose(pixels, slope * values + offset, atol=tolerance)


def test_curves_hold_every_event_of_every_training() -> None:
    config = Config(steps=STEPS)
    metrics = {name: training_metrics(config, name) for name in config.trained_candidates}
    figures = _training_figures(config, metrics)
    kinds = {"loss": ("train_loss", "validation_loss"), "learning_rate": ("learning_rate",)}
    kinds |= {"throughput": ("tokens_per_s",)}
    for figure, kind, name in [(f, kind, name) for f, some in kinds.items() for kind in some for name in metrics]:
        events = [event for event in metrics[name]["curve"] if kind in event]
        corners = drawn(str(figures[figure]), f"{kind}-{name}")
        assert len(corners) == len(events) >= 5
        assert_affine(corners[:, 0], np.array([event["step"] for event in events]), WRITTEN_DIGITS)
        assert_affine(corners[:, 1], np.array([event[kind] for event in events]), WRITTEN_DIGITS)


def test_a_long_curve_is_simplified_by_less_than_the_eye_sees() -> None:
    steps = np.arange(20_000)
    values = 3 + np.exp(-steps / 3000)
    ends = Curve("ends", [0, 19_999], [values[0], values[-1]], 0)
    svg = str(curves([Curve("long", steps, values, 0), ends], "step", "loss", 800, 270, from_zero=False))
    (x0, y0), (x1, y1) = drawn(svg, "ends")
    corners = drawn(svg, "long")
    assert len(corners) < len(steps) / 10
    expected_x = x0 + (x1 - x0) * steps / steps[-1]
    expected_y = y0 + (y1 - y0) * (values - values[0]) / (values[-1] - values[0])
    drawn_y = np.interp(expected_x, corners[:, 0], corners[:, 1])
    assert np.abs(drawn_y - expected_y).max() <= SIMPLIFICATION_POINTS + WRITTEN_DIGITS


def test_candidates_stand_where_their_numbers_say() -> None:
    points = [
        Point("a", "base", 17.1, 2.48, 0, quantized=False, passed=True, chosen=False, on_front=True),
        Point("b", "student", 6.0, 2.69, 1, quantized=False, passed=True, chosen=False, on_front=True),
        Point("c", "base_int8", 4.4, 2.49, 0, quantized=True, passed=False, chosen=False, on_front=True),
    ]
    svg = str(plane(points, "size, MB", "bits per byte", BASELINES, "front", 390, 250))
    places = [next(one for one in element(svg, point.gid).iter() if one.tag == "use") for point in points]
    for axis in ("x", "y"):
        pixels = np.array([float(place.attrib[axis]) for place in places])
        assert_affine(pixels, np.array([getattr(point, axis) for point in points]), WRITTEN_DIGITS)
    texts = {"".join(one.itertext()) for one in ElementTree.fromstring(svg).iter() if one.tag == "text"}
    assert {"base", "student", "base_int8", "unigram 3.08", "xz -9 2.20"} <= texts


def test_the_front_is_a_staircase_through_the_candidates_that_are_on_it() -> None:
    places = [(6.0, 2.69), (17.1, 2.48), (4.4, 2.9), (17.1, 2.7)]
    points = [
        Point(f"p{number}", f"p{number}", x, y, 0, quantized=False, passed=True, chosen=False, on_front=number < 3)
        for number, (x, y) in enumerate(places)
    ]
    svg = str(plane(points, "size, MB", "bits per byte", BASELINES, "front", 390, 250))
    stairs = [(4.4, 2.9), (6.0, 2.9), (6.0, 2.69), (17.1, 2.69), (17.1, 2.48)]
    corners = drawn(svg, "front")
    assert len(corners) == len(stairs)
    for axis in (0, 1):
        assert_affine(corners[:, axis], np.array(stairs)[:, axis], WRITTEN_DIGITS)
    assert "fill: var(--muted)" in ElementTree.tostring(element(svg, "p3"), encoding="unicode")
    assert "fill: var(--series-0)" in ElementTree.tostring(element(svg, "p0"), encoding="unicode")


def test_a_mark_says_why_it_was_rejected() -> None:
    note = "base_int8: p50 latency in ms 9.87 is 1.049 x the 9.41 of base <&>"
    point = Point("a", "base_int8", 1.0, 2.5, 0, quantized=True, passed=False, chosen=False, on_front=False, note=note)
    svg = str(plane([point], "size, MB", "bits per byte", BASELINES, "front", 390, 250))
    assert element(svg, "a")[0].text == note
    assert 'id="front"' not in svg


def test_a_plot_stands_alone_in_the_light_colours_of_the_page() -> None:
    point = Point("a", "base", 1.0, 2.5, 0, quantized=False, passed=True, chosen=False, on_front=True)
    style = (TEMPLATES / STYLE_SHEET).read_text()
    svg = standalone(plane([point], "size, MB", "bits per byte", BASELINES, "front", 390, 250), style)
    assert "var(" not in svg
    assert "#0067a8" in svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_rejected_candidate_is_crossed_and_the_chosen_one_ringed() -> None:
    point = Point("a", "base", 1.0, 2.5, 0, quantized=False, passed=True, chosen=False, on_front=True)
    passed, rejected, chosen = (
        str(plane([one], "size, MB", "bits per byte", BASELINES, "front", 390, 250))
        for one in (point, replace(point, passed=False), replace(point, chosen=True))
    )
    assert "fill: var(--series-0)" in passed
    assert "fill: var(--series-0)" not in rejected
    assert "fill: var(--card)" in rejected
    assert rejected.count("<use") == passed.count("<use") + 1
    assert chosen.count("<use") == passed.count("<use") + 1


@pytest.mark.parametrize("places", [(5.0, 6.0), (17.0, 17.1, 17.2)])
def test_crowded_names_cover_neither_each_other_nor_marks(places: tuple[float, ...]) -> None:
    names = [f"student_pruned_{number}" for number in range(len(places))]
    near = [
        Point(name, name, x, 2.5, 0, quantized=False, passed=True, chosen=False, on_front=True)
        for name, x in zip(names, places, strict=True)
    ]
    svg = str(plane(near, "size, MB", "bits per byte", BASELINES, "front", 390, 250))
    boxes = [text_box(one) for one in ElementTree.fromstring(svg).iter() if one.tag == "text" and one.text in names]
    assert len(boxes) == len(names)
    marks = [next(one for one in element(svg, name).iter() if one.tag == "use") for name in names]
    for mark in marks:
        x, y = float(mark.attrib["x"]), float(mark.attrib["y"])
        boxes.append((x - 6, x + 6, y - 6, y + 6))
    for one, other in combinations(boxes, 2):
        if one in boxes[len(names) :]:
            continue  # marks lie where the numbers say
        assert one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2], (one, other)


def text_box(text: ElementTree.Element) -> tuple[float, float, float, float]:
    """About where a text is: left, right, top, bottom; a letter of 9 points is taken as 4.5 wide and 6 high."""
    x, y, width = float(text.attrib["x"]), float(text.attrib["y"]), 4.5 * len(str(text.text))
    held_by = re.findall(r"text-anchor: (\w+)", text.attrib["style"])[0]
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[held_by]
    return left, left + width, y - 6, y


def test_text_is_text_and_is_not_read_as_mathematics() -> None:
    svg = str(curves([Curve("a", [0, 1], [1, 2], 0)], "step", "cost in $x_1$ & <b>", 390, 250, from_zero=True))
    texts = {"".join(one.itertext()) for one in ElementTree.fromstring(svg).iter() if one.tag == "text"}
    assert "cost in $x_1$ & <b>" in texts
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that the style sheet does not decide on"
