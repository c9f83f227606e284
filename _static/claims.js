// The filters of the ledger: without this script they stay hidden, and every claim is shown.
// What is chosen stands in the address ("claims.html?verdict=mixed"), so that it can be linked.
document.addEventListener("DOMContentLoaded", () => {
  for (const ledger of document.querySelectorAll(".sinkbook-ledger")) {
    const form = ledger.querySelector(".filters");
    const cards = [...ledger.querySelectorAll(".sinkbook-claim")];
    const choices = [...form.querySelectorAll("select")];
    const all = form.querySelector("button");
    const remember = (chosen) => {
      const asked = new URLSearchParams(chosen.map(({ name, value }) => [name, value])).toString();
      try {
        history.replaceState(null, "", `${location.pathname}${asked && `?${asked}`}${location.hash}`);
      } catch {
        // Some browsers let no page that is opened as a file change its address.
      }
    };
    const show = () => {
      const chosen = choices.filter(({ value }) => value);
      all.hidden = !chosen.length;
      for (const card of cards) {
        card.hidden = !chosen.every(({ name, value }) => card.dataset[name] === value);
      }
      for (const section of ledger.querySelectorAll("section")) {
        section.hidden = !section.querySelector(".sinkbook-claim:not([hidden])");
      }
      const shown = cards.filter(({ hidden }) => !hidden).length;
      form.querySelector("output").textContent = `${shown} of ${cards.length} claims`;
    };
    const choose = () => {
      show();
      remember(choices.filter(({ value }) => value));
    };
    const asked = new URLSearchParams(location.search);
    for (const choice of choices) {
      const wanted = asked.get(choice.name);
      if ([...choice.options].some(({ value }) => value === wanted)) choice.value = wanted;
    }
    form.addEventListener("change", choose);
    form.addEventListener("reset", () => setTimeout(choose));  // once the fields are empty
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
