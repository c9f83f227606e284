// Guesses with choices: the one that a reader takes is marked, and what was folded opens. Nothing
// is graded or remembered; the page then shows what the run says.

/** The fold that answers a guess: the next one behind it, before another guess. */
function answerTo(guess) {
  for (let node = guess.nextElementSibling; node; node = node.nextElementSibling) {
    if (node.matches("details.sinkbook-answer")) return node;
    if (node.matches(".sinkbook-guess")) return null;
  }
  return null;
}

function startGuesses() {
  for (const choices of document.querySelectorAll(".sinkbook-choices")) {
    const answer = answerTo(choices.closest(".sinkbook-guess"));
    const [says, buttons] = [choices.querySelector("p"), choices.querySelectorAll("button")];
    choices.hidden = false;
    for (const button of buttons) {
      button.addEventListener("click", () => {
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        says.textContent = `Your guess: ${button.textContent.trim()}. Now look.`;
        if (answer) answer.open = true;
      });
    }
  }
}

for (const start of [startFormulas, startGuesses]) {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
}
