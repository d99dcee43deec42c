"use strict";
// Before the first paint: the theme and the language that were chosen last time, so that nothing flashes.
(() => {
  const root = document.documentElement;
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem("liubai")) || {}; } catch { /* storage is off: the defaults hold */ }
  if (kept.theme === "light" || kept.theme === "dark") root.dataset.theme = kept.theme;
  const chinese = (navigator.languages || [navigator.language || "en"])[0].toLowerCase().startsWith("zh");
  root.lang = kept.language === "en" || kept.language === "zh" ? kept.language : chinese ? "zh" : "en";
})();
