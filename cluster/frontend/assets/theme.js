// Loaded before the style: a theme that somebody chose must not flash in.
const chosen = localStorage.getItem("shoal.theme");
if (chosen) document.documentElement.dataset.theme = chosen;
