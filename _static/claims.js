// The filters of the ledger: without this script they stay hidden, and every claim is shown.
document.addEventListener("DOMContentLoaded", () => {
  for (const ledger of document.querySelectorAll(".sinkbook-ledger")) {
    const form = ledger.querySelector(".filters");
    const cards = [...ledger.querySelectorAll(".sinkbook-claim")];
    const show = () => {
      const chosen = [...form.querySelectorAll("select")].filter(({ value }) => value);
      for (const card of cards) {
        card.hidden = !chosen.every(({ name, value }) => card.dataset[name] === value);
      }
      for (const section of ledger.querySelectorAll("section")) {
        section.hidden = !section.querySelector(".sinkbook-claim:not([hidden])");
      }
      const shown = cards.filter(({ hidden }) => !hidden).length;
      form.querySelector("output").textContent = `${shown} of ${cards.length} claims`;
    };
    form.addEventListener("change", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    show();  // browsers keep what was chosen before a page is loaded again
    // A link to a card that is filtered away shows all.
    addEventListener("hashchange", () => {
      const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (card?.hidden) {
        form.reset();
        show();
        card.scrollIntoView();
      }
    });
  }
});
