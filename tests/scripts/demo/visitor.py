"""What a person does in the page, and sees of it."""

import io
import re

from PIL import Image

WAITING = "waiting"
PICTURES = "xpath=following::div[contains(@class, 'image-frame')]//img"


class Visitor:
    """A person in a page of a browser. `errors` are those of its console and its scripts."""

    def __init__(self, page, url):
        self.page, self.errors = page, []
        page.set_default_timeout(60_000)
        page.on("console", lambda each: self.errors.append(each.text) if each.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        self.button("Sample").wait_for()

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def open(self, tab):
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def fill(self, label, value):
        """Write into the field of the open tab whose label begins so."""
        name = re.compile(f"^(number input for )?{label}")
        kinds = (self.page.get_by_role(role, name=name) for role in ("textbox", "spinbutton", "combobox"))
        (field,) = (each for kind in kinds for each in kind.all() if each.is_visible())
        field.fill(str(value))
        field.press("Enter")
        field.press("Tab")

    def text(self, label):
        return self.page.get_by_label(label, exact=True).input_value()

    def wait(self, condition):
        """Until a condition holds; returns what it returned."""
        for _ in range(2000):
            if found := condition():
                return found
            self.page.wait_for_timeout(30)
        raise AssertionError(f"waited in vain: {self.page.locator('body').inner_text()}")

    def source(self, button):
        """The address of the picture below a button, which is made of its bytes; "" before there is one."""
        shown = [each for each in self.button(button).locator(PICTURES).all() if each.is_visible()]
        return shown[0].get_attribute("src") if shown else ""

    def picture(self, button):
        return Image.open(io.BytesIO(self.page.request.get(self.source(button)).body())).convert("RGB")

    def sample(self, **fields):
        """Sample, and return the costs and the rows of pictures, without their texts."""
        self.start_sampling(**fields)
        return self.samples()

    def start_sampling(self, **fields):
        for label, value in fields.items():
            self.fill(label, value)
        self.page.get_by_label("Cost", exact=True).evaluate(f"field => field.value = '{WAITING}'")  # costs may be equal
        self.button("Sample").click()

    def samples(self):
        """Wait for the end of a run: costs and rows of pictures."""
        self.wait(lambda: self.text("Cost") != WAITING)
        self.wait(lambda: "predicted" not in self.text("Cost") and self.is_idle())
        costs, sheet = self.text("Cost").splitlines(), self.picture("Sample")
        height = sheet.height // len(costs)
        rows = [sheet.crop((0, i * height + 30, sheet.width, (i + 1) * height)) for i in range(len(costs))]
        return costs, [row.tobytes() for row in rows]

    def is_idle(self):
        """Whether no run is shown as going on."""
        return not any(each.is_visible() for each in self.page.locator(".progress-text, .generating").all())

    def is_told(self, message):
        """Wait for a message of the page, and close it."""
        self.page.get_by_text(message).first.wait_for()
        for close in self.page.get_by_role("button", name="Close").all():
            close.click()

    def fits(self):
        """Whether nothing is wider than the window."""
        return self.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
