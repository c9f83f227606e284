// The widget bundle typesets with MathJax 2's queue; the pages carry MathJax 3, which has none.
document.addEventListener("DOMContentLoaded", () => {
  window.MathJax = window.MathJax || {};
  window.MathJax.Hub = window.MathJax.Hub || { Queue() {}, Config() {}, Register: { StartupHook() {} } };
});
