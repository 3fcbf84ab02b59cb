// Loaded before the style: a theme that somebody chose must not flash in.
try {
  const chosen = localStorage.getItem("shoal.theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // The browser lets no page keep anything: the system's theme.
}
