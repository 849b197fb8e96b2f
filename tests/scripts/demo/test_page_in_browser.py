"""The page as a person uses it, in a real browser: at the width of a desk, and of a phone."""

import pytest
from PIL import Image, ImageDraw
from visitor import Visitor

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ERRORS = "A, its latent, the latent decoded, 10 times the error"
DISTANCES = "Cost, and distance from the solution of the ODE"


@pytest.fixture(scope="module")
def url(serve):
    return serve("-m", "ddim_plugin.cli", "demo", "--port", "PORT")


@pytest.fixture
def visit(browser, url):
    """Visitors, each in a browser of its own, whose consoles have no error at the end."""
    visitors = []

    def come(size=DESK):
        visitors.append(Visitor(browser.new_context(viewport=size).new_page(), url))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.page.context.close()
    assert [visitor.errors for visitor in visitors] == [[]] * len(visitors)


def calls(costs):
    return [line.rpartition(",")[0] for line in costs]


def test_samples(visit):
    desk = visit()
    costs, (two, three) = desk.sample(Numbers="2 3", Pictures=2)
    assert calls(costs) == ["S = 2: 2 calls of the network", "S = 3: 3 calls of the network"]
    assert all(0 < float(line.split()[-2]) < 60 for line in costs)
    assert two != three
    _, again = desk.sample()
    assert again == [two, three]
    _, (other,) = desk.sample(Numbers="3", Seed=1)
    assert other != three
    _, (noisy,) = desk.sample(Seed=0, η=1)
    assert noisy != three
    costs, (quadratic,) = desk.sample(η=0, Timesteps="quadratic")
    assert quadratic not in (three, noisy)
    costs, (listed,) = desk.sample(Timesteps="900 500 100 1")
    assert calls(costs) == ["S = 4: 4 calls of the network"]
    assert listed not in (quadratic, three)


def test_previews_are_shown_while_a_run_goes_on(visit):
    desk = visit()
    desk.page.evaluate(
        """() => {
            window.sources = new Set()
            const note = (changes) => changes.forEach((each) => window.sources.add(each.target.src))
            const kinds = { subtree: true, attributes: true, attributeFilter: ["src"] }
            new MutationObserver(note).observe(document.body, kinds)
        }"""
    )
    costs, _ = desk.sample(Numbers=300, Pictures=1)
    assert calls(costs) == ["S = 300: 300 calls of the network"]
    assert desk.page.evaluate("window.sources.size") >= 3  # two previews, and the picture


def test_latents(visit, tmp_path):
    desk = visit()
    desk.open("Latents")
    photograph = Image.new("RGB", (90, 62))
    ImageDraw.Draw(photograph).ellipse((30, 12, 60, 50), outline="white", width=5)
    photograph.save(tmp_path / "photograph.png")
    places = desk.page.locator(".pixels").all()
    before = [place.locator(".image-frame img").get_attribute("src") for place in places]
    places[0].get_by_role("button", name="Remove Image").click()
    with desk.page.expect_file_chooser() as chooser:
        places[0].get_by_text("Click to Upload").click()
    chooser.value.set_files(tmp_path / "photograph.png")
    desk.page.get_by_role("radio", name="B", exact=True).check()
    last = desk.page.get_by_role("button", name="Thumbnail").last
    last.click()
    shown = [lambda place=place: place.locator(".image-frame img").get_attribute("src") for place in places]
    assert desk.wait(shown[0]) != before[0]
    desk.wait(lambda: shown[1]() == last.locator("img").get_attribute("src") != before[1])
    assert [each() for each in shown[2:]] == before[2:]

    desk.fill("Number of steps", 3)
    desk.button("Reconstruct A").click()
    lines = desk.wait(lambda: len(found := desk.text(ERRORS).splitlines()) == 2 and found)
    plain, exact = (float(line.split(" error ")[1].split(",")[0]) for line in lines)
    assert [line.split(":")[0] for line in lines] == ["plain", "exact"]
    assert 0 < exact < plain / 2
    assert lines[0].endswith("3 + 3 calls")
    assert desk.picture("Reconstruct A").height > 150

    desk.button("Path from A to B").click()
    ends = [desk.wait(lambda: desk.is_idle() and desk.source("Path from A to B"))]
    for place in (10.4, 20):
        desk.fill("From A to B", place)
        ends.append(desk.wait(lambda: desk.source("Path from A to B") not in ends and desk.source("Path from A to B")))
    assert len(set(ends)) == 3

    desk.button("Grid between A, B, C and D").click()
    desk.wait(lambda: desk.source("Grid between A, B, C and D"))
    assert min(desk.picture("Grid between A, B, C and D").size) > 7 * 56


def test_few_steps(visit):
    desk = visit()
    desk.open("Few steps")
    desk.fill("Number of steps", 2)
    desk.fill("Pictures", 1)
    desk.button("Compare").click()
    lines = desk.wait(lambda: "DEIS" in (text := desk.text(DISTANCES)) and text.splitlines())
    assert lines[0].startswith("the solution: 100 steps, ")
    assert [line.split(":")[0] for line in lines[1:3]] == ["ddim-plugin", "DDIM"]
    assert all(": 2 steps, " in line and 0 < float(line.split()[-1]) < 1 for line in lines[1:])
    assert desk.picture("Compare").height > 90 * len(lines) - 30


def test_wrong_input_is_answered_in_the_page(visit, tmp_path):
    desk = visit()
    desk.fill("Pictures", 1)
    for label, wrong, right, said in [
        ("Numbers", "five", "2", "'five' is no list of numbers: write them like 5 10 20"),
        ("Numbers", "2 2000", "2", "2000"),
        ("Seed", "", "0", "the seed must be a whole number"),
        ("Seed", "1.7", "0", "the seed must be a whole number"),
        ("Pictures", "1.5", "1", "the number of pictures must be an integer"),
    ]:
        desk.fill(label, wrong)
        desk.button("Sample").click()
        desk.is_told(said)
        desk.fill(label, right)
    assert calls(desk.sample()[0]) == ["S = 2: 2 calls of the network"]
    desk.open("Latents")
    desk.page.get_by_role("button", name="Remove Image").first.click()
    desk.button("Reconstruct A").click()
    desk.is_told("there is no picture at A: upload or choose one")
    Image.new("RGB", (90, 62)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    for name, damaged in (("text.png", b"no picture"), ("half.png", content[: len(content) // 2])):
        (tmp_path / name).write_bytes(damaged)
        desk.page.locator(".pixels input[type=file]").first.set_input_files(tmp_path / name)
        desk.page.get_by_role("button", name="Remove Image").first.wait_for()
        desk.button("Reconstruct A").click()
        desk.is_told("the file at A cannot be read as a picture: upload a PNG, JPEG or WebP file")
        desk.page.get_by_role("button", name="Remove Image").first.click()


def test_visitors_do_not_mix(visit):
    first, second = visit(), visit()
    alone = [first.sample(Numbers="3 4 5", Pictures=2)[1], second.sample(Numbers="3 4 5", Pictures=2, Seed=7)[1]]
    assert alone[0] != alone[1]
    for each in (first, second):
        each.start_sampling()
    assert [each.samples()[1] for each in (first, second)] == alone


def test_a_phone(visit):
    phone = visit(PHONE)
    assert phone.fits()
    assert calls(phone.sample(Numbers="2", Pictures=4)[0]) == ["S = 2: 2 calls of the network"]
    assert phone.fits()
    for tab, button in (("Latents", "Reconstruct A"), ("Few steps", "Compare")):
        phone.open(tab)
        phone.button(button).wait_for()
        assert phone.fits()
