"""The rooms of CONTRIBUTING.md are those of the code: imports run one way, those inside functions too, in no circle."""

import re

from tests.imports import ROOT, circle, graph


def drawn() -> tuple[list[str], list[str], set[tuple[str, str]]]:
    """(rooms from the top down, ground rooms, arrows) of the picture in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = re.search(r"```rooms\n(.*?)```", text, re.DOTALL)
    assert picture is not None
    rooms, ground, arrows = [], [], set()
    for line in picture[1].splitlines():
        room, _, targets = line.partition("->")
        if _:
            rooms.append(room.strip())
            arrows |= {(room.strip(), t.strip()) for t in targets.split(",")}
        else:
            ground = line.removeprefix("ground").replace(",", " ").split()
    return rooms, ground, arrows


def room_of(module: str) -> str:
    package, *rest = module.split(".")
    return rest[0] if package == "hnet" and rest else package


def test_the_picture_is_the_code():
    rooms, ground, arrows = drawn()
    found = {(room_of(a), room_of(b)) for a, names in graph("hnet", "hnet_kernels").items() for b in names}
    found = {(a, b) for a, b in found if a != b and a not in ("hnet", "__main__")}
    assert {(a, b) for a, b in found if b not in ground and a not in ground} == arrows
    order = [*rooms, "hnet_kernels"]
    for a, b in arrows:
        assert order.index(a) < order.index(b), (a, b)
    for a, b in found:
        if a in ground:
            assert b in ground[: ground.index(a)], (a, b)
        assert a != "hnet_kernels", (a, b)


def test_no_circles():
    assert circle(graph("hnet", "hnet_kernels")) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
