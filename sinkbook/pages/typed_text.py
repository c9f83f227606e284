"""Every head of a model on a text that is typed, which needs a kernel: for notebooks, not pages."""

from collections.abc import Mapping
from html import escape

import ipywidgets as widgets

from sinkbook.models.pretrained import LanguageModel
from sinkbook.pages import heads


class TypedText(widgets.VBox):
    """A line to type a text in, and every head on it, opened at its strongest sink.

    What is wrong with a text is said in words, and what was shown before stays.
    """

    def __init__(self, language_model: LanguageModel):
        self.language_model = language_model
        self.text = widgets.Text(
            description="text",
            placeholder="type a text and press Enter",
            continuous_update=False,
            layout=widgets.Layout(width="100%", max_width="40rem"),
        )
        self.message = widgets.HTML()
        self.shown = widgets.Output()
        self.text.observe(self._typed, "value")
        super().__init__([self.text, self.message, self.shown])

    def _typed(self, change: Mapping) -> None:
        self._say("Reading your text ...")
        try:
            (reading,) = heads.read(self.language_model, {"your text": change["new"]})
            viewer = heads.Viewer([reading], (reading.name, *heads.strongest(reading)))
        except Exception as error:  # whatever a model makes of a text, the next one can be typed
            self._say(f"Not shown: {error or type(error).__name__}")
            return
        self.shown.outputs = ()
        self.shown.append_display_data(viewer)
        self._say("")

    def _say(self, words: str) -> None:
        self.message.value = f"<p role='status' style='margin: 0'>{escape(words)}</p>"
