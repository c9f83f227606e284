"""What a reader does with the labs: types, touches, starts, stops, slides, in light and dark."""

import re

import pytest

from sinkbook.pages import lab, scripts

from .conftest import ROOT

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
KINDS = ["typed", "training", "compact", "recorded"]
# Few steps, so that a slow machine ends them: the settings of the page's training are changed.
SHORT = """addEventListener("DOMContentLoaded", () => {
  const about = document.querySelector("script[type='application/json']");
  const read = JSON.parse(about.textContent);
  if (read.settings) read.settings.steps = 24;
  about.textContent = JSON.stringify(read);
}, true);"""  # before the lab itself reads them
CALM = """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"""


def sentence(tab) -> str:
    return tab.locator(".lab-says").first.inner_text()


def finished(tab) -> None:
    tab.wait_for_function("() => sinkbookLab.labs[0].step >= 24 && !sinkbookLab.labs[0].running")


def weights(tab, row: int) -> list[float]:
    """The opacities of a row of the map, once they have settled."""
    tab.wait_for_selector(".lab-live .cell")
    return tab.evaluate(
        """row => {
          const cells = [...document.querySelectorAll(".lab-live .cell")];
          const from = row * (row + 1) / 2;
          return cells.slice(from, from + row + 1).map(cell => +cell.getAttribute("fill-opacity"));
        }""",
        row,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_lab_fits_its_page_and_can_be_read(opened, kind, theme, width):
    tab = opened(kind, theme=theme, viewport={"width": width, "height": 900})
    tab.wait_for_selector(".lab-live .cell")
    tab.evaluate(CALM)
    page = tab.evaluate(
        """() => {
          const small = [], unreadable = [];
          const light = (colour) => {
            const full = colour.startsWith("color") ? 1 : 255;
            const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => {
              const s = c / full;
              return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = (node) => {
            for (; node; node = node.parentElement) {
              const colour = getComputedStyle(node).backgroundColor;
              if (!/, 0\\)$|transparent/.test(colour)) return colour;
            }
            return "rgb(255, 255, 255)";
          };
          for (const node of document.querySelectorAll(".sinkbook-lab *")) {
            const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim());
            if (!own || !node.checkVisibility() || node.closest(".lab-heard, script")) continue;
            const style = getComputedStyle(node);
            const picture = node.ownerSVGElement;
            const shown = picture?.getBoundingClientRect().width;
            const scale = picture ? shown / picture.viewBox.baseVal.width : 1;
            if (parseFloat(style.fontSize) * scale < 10) small.push(node.textContent);
            const ink = node.ownerSVGElement ? style.fill : style.color;
            const [a, b] = [light(ink), light(ground(node))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5 && !node.closest(":disabled"))
              unreadable.push([node.textContent, ink, ground(node)]);
          }
          const root = document.documentElement;
          return { small, unreadable, overflow: root.scrollWidth - root.clientWidth };
        }"""
    )
    assert page == {"small": [], "unreadable": [], "overflow": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_has_a_name_and_every_picture_says_what_it_shows(opened, kind):
    tab = opened(kind)
    tab.wait_for_selector(".lab-live .cell")
    for role in ("button", "textbox", "slider", "radio", "switch", "combobox"):
        every = tab.get_by_role(role).count()
        assert tab.get_by_role(role, name=re.compile(r"\w")).count() == every, role
    assert tab.locator("svg.map[role=img]").get_attribute("aria-label")
    if kind != "compact":  # which is running
        assert tab.locator("[aria-live=polite]").inner_text() == sentence(tab)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_script_there_is_the_picture_and_what_it_shows(opened, kind):
    tab = opened(kind, java_script_enabled=False)
    picture = tab.locator("svg.map[role=img]")
    assert picture.bounding_box()["height"] > 200 and tab.locator(".lab-says").is_visible()
    assert "attention" in picture.get_attribute("aria-label")


def test_the_two_scripts_are_light_and_classic():
    made = scripts.lab_scripts(ROOT)
    assert sum(len(text.encode()) for text in made.values()) < 250_000
    for text in made.values():
        assert not re.search(r"\bfetch\(|^\s*(?:import|export)\b|XMLHttpRequest", text, re.M)


def test_typing_is_answered_letter_by_letter(opened):
    tab = opened("typed")
    text = tab.get_by_label("A text")
    text.fill("vt")
    assert weights(tab, 2)[1] > 0.5  # the trigger looks at the v before it
    assert "At t the head looks most at v, the one before" in sentence(tab)
    assert tab.locator(".lab-next li").first.locator(".name").inner_text() == "v"
    text.press_sequentially("n")
    assert weights(tab, 3)[0] > 0.5
    text.press_sequentially("ü")
    assert "The language has no “ü”; left out." in sentence(tab)
    text.fill("")
    assert weights(tab, 0) == [1]


def test_switches_change_what_they_say(opened):
    tab = opened("typed")
    tab.get_by_label("A text").fill("vt")

    def expected() -> str:
        return tab.locator(".lab-next li").first.locator(".name").inner_text()

    def risks() -> list[float]:
        return [float(text) for text in tab.locator(".lab-risks b").all_inner_texts()]

    whole = risks()
    assert expected() == "v"
    tab.get_by_role("switch", name="head").uncheck()
    blind = risks()
    assert expected() != "v" and "The head is off" in sentence(tab)
    assert blind[0] > whole[0] + 1 and blind[1] < whole[1] + 0.2
    tab.get_by_role("switch", name="head").check()
    tab.get_by_role("switch", name="MLP").uncheck()
    assert risks()[1] > whole[1] + 0.5
    tab.get_by_role("switch", name="MLP").check()
    assert risks() == whole
    tab.get_by_role("switch", name="loud").check()
    assert "The value of <s> is 1.00 times" in sentence(tab) and risks()[1] > whole[1]
    tab.get_by_role("switch", name="loud").uncheck()
    tab.get_by_label("A text").fill("vtn")
    tab.get_by_role("radio", name="ReLU").check()
    assert sum(weights(tab, 3)) < 0.2


def test_a_row_is_chosen_by_pointer_finger_and_key(opened):
    tab = opened("typed", **PHONE)
    tab.wait_for_selector(".lab-live .cell")
    slider = tab.get_by_role("slider", name="read up to")
    assert slider.get_attribute("aria-valuetext") == "h"
    box = tab.locator("svg.map").bounding_box()
    cell = tab.locator(".lab-live .ground").nth(2).bounding_box()
    tab.touchscreen.tap(box["x"] + 40, cell["y"] + cell["height"] / 2)
    assert slider.get_attribute("aria-valuetext") == "t" and "At t" in sentence(tab)
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "v"
    tab.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "<s>"


def test_a_training_starts_stops_and_steps_by_the_keyboard(opened):
    tab = opened("training", script=SHORT.replace("24", "100_000"))
    main = tab.locator(".lab-main")
    main.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => sinkbookLab.labs[0].step >= 8")
    assert main.inner_text().strip() == "Stop"
    tab.keyboard.press("Space")
    tab.wait_for_function("() => !sinkbookLab.labs[0].running")
    assert main.inner_text().strip() == "Go on"
    tab.wait_for_function("""() => new Promise((settled) => {
      const { step } = sinkbookLab.labs[0];
      setTimeout(() => settled(sinkbookLab.labs[0].step === step), 1000);
    })""")
    step = tab.evaluate("() => sinkbookLab.labs[0].step")
    tab.get_by_role("button", name="One step").press("Enter")
    tab.wait_for_function("step => sinkbookLab.labs[0].step === step + 1", arg=step)
    assert f"step {step + 1} of" in tab.locator(".lab-count").inner_text()


def test_a_training_that_has_ended_goes_on_where_the_reader_asks_for_it(opened):
    tab = opened("training", script=SHORT)
    main = tab.locator(".lab-main")
    main.click()
    finished(tab)
    assert "After 24 steps" in sentence(tab) and main.inner_text().strip() == "Go on"
    main.click()
    tab.wait_for_function("() => sinkbookLab.labs[0].step === 48")


def test_a_finger_trains_and_switches_to_relu_and_the_curves_before_stay_in_sight(opened):
    tab = opened("training", script=SHORT, **PHONE)
    tab.locator(".lab-main").tap()
    finished(tab)
    assert tab.locator(".line.before").count() == 0
    for name in ("ReLU", "without", "SGD"):
        tab.locator(".lab-pills label", has_text=name).tap()
    settings = tab.evaluate("() => sinkbookLab.labs[0].settings")
    assert (settings["attention"], settings["starts"], settings["optimizer"]) == ("relu", 0, "sgd")
    assert settings["rate"] == float(tab.get_by_label("Learning rate").input_value()) == 0.2
    assert tab.evaluate("() => sinkbookLab.labs[0].step") == 0
    tab.locator(".lab-main").tap()
    finished(tab)
    assert tab.locator(".line.before").count() > 0
    assert "<s>" not in tab.locator(".lab-live svg.map").text_content()


def test_the_slow_seed_says_so_and_all_choices_are_those_of_the_settings(opened):
    tab = opened("training", script=SHORT)
    seeds = tab.get_by_label("Seed").locator("option").all_inner_texts()
    assert f"{lab.SLOW_SEED}, a slow one" in seeds
    tab.get_by_label("Seed").select_option(str(lab.SLOW_SEED))
    tab.get_by_label("Learning rate").select_option("0.06")
    settings = tab.evaluate("() => sinkbookLab.labs[0].settings")
    assert (settings["seed"], settings["rate"]) == (lab.SLOW_SEED, 0.06)


def test_a_page_in_the_index_starts_by_itself_unless_calm_is_asked_for(opened):
    tab = opened("compact", script=SHORT)
    finished(tab)
    quiet = opened("compact", script=SHORT, reduced_motion="reduce")
    quiet.wait_for_selector(".lab-live .cell")
    quiet.wait_for_timeout(500)
    assert quiet.evaluate("() => sinkbookLab.labs[0].step") == 0
    assert quiet.evaluate(
        "() => getComputedStyle(document.querySelector('.cell')).transitionDuration"
    ) in ("0s", "")
    quiet.locator(".lab-main").click()
    finished(quiet)


def test_where_a_page_may_have_no_worker_it_trains_all_the_same(opened):
    tab = opened("training", script=SHORT + "window.Worker = undefined;")
    tab.locator(".lab-main").click()
    finished(tab)
    assert tab.evaluate("() => [window.Worker ?? null, sinkbookLab.labs[0].step]") == [None, 24]


def test_where_a_browser_has_no_wasm_the_plain_kernel_takes_its_place(opened):
    tab = opened("typed", script="window.WebAssembly = undefined;")
    assert tab.evaluate("() => sinkbookLab.engine.fastestKernel().name") == "plain"
    assert weights(tab, 1)[0] > 0.5


def test_sliding_through_training_shows_the_recorded_steps(opened, runs):
    tab = opened("recorded")
    measured = runs["softmax"].measurements.isel(layer=0, head=0)
    slider = tab.get_by_role("slider", name="step")
    slider.focus()
    tab.keyboard.press("Home")
    first, last = (measured.isel(step=i) for i in (0, -1))
    assert slider.get_attribute("aria-valuetext") == "step 0"
    assert f"give <s> {first.sink_attention.item():.2f}" in sentence(tab)
    early = weights(tab, 5)
    tab.keyboard.press("End")
    assert f"give <s> {last.sink_attention.item():.2f}" in sentence(tab)
    assert f"{last.bigram_excess.item():.2f} nats" in sentence(tab)
    tokens = runs["softmax"].evaluation_tokens[:1, : lab.TOKENS_SHOWN]
    reading = lab.read(runs["softmax"], tokens)
    late = weights(tab, 5)
    assert late == pytest.approx(reading.weights[5, :6].tolist(), abs=3e-3) and late != early
    tab.get_by_role("button", name="Play").click()
    tab.wait_for_function("() => sinkbookLab.labs[0].at > 2")
    slider.press("Home")  # who slides takes over
    tab.wait_for_timeout(700)
    assert slider.get_attribute("aria-valuetext") == "step 0"


def test_play_goes_one_step_at_a_time_where_calm_is_asked_for(opened):
    tab = opened("recorded", reduced_motion="reduce")
    tab.get_by_role("slider", name="step").press("Home")
    tab.get_by_role("button", name="Next").click()
    tab.wait_for_timeout(600)
    assert tab.evaluate("() => sinkbookLab.labs[0].at") == 1
