// Every lab of a page, put in the place of its still picture; and what the page answers.

const LABS = { typed: TypedLab, training: TrainingLab, recorded: RecordedLab };

function startLabs() {
  const labs = [...document.querySelectorAll(".sinkbook-lab[data-lab]")].map((host) => {
    const about = JSON.parse(host.querySelector("script[type='application/json']").textContent);
    const live = html("div", { class: "lab-live" });
    host.querySelector(".lab-still").replaceWith(live);
    return new LABS[host.dataset.lab](live, about);
  });
  const typed = labs.find((lab) => lab instanceof TypedLab);
  window.sinkbookLab = {
    engine,
    labs,
    /** Next-token logits after every position of a text, by a model of the page. */
    logits: (text, model, options = {}) => {
      if (!typed) throw new Error("no model to type a text into on this page");
      return typed.logits(text, model, options);
    },
  };
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", startLabs);
else startLabs();
