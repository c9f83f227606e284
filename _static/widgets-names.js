// The widget bundle draws a slider's name beside it, but does not tell it to screen readers.
document.addEventListener("focusin", ({ target }) => {
  const label = target.closest(".widget-slider")?.querySelector(".widget-label");
  if (label && target.matches(".noUi-handle")) target.setAttribute("aria-label", label.textContent);
});
