"use strict";
// Only comfort: the values under the pointer, and one question at a time. Without it all is shown.
document.querySelectorAll("svg[data-hover]").forEach((svg) => {
  const data = JSON.parse(svg.dataset.hover), figure = svg.parentElement;
  const all = data.series.flatMap((s) => s.points);
  if (!all.length) return;
  const tip = document.createElement("div");
  const cross = document.createElementNS(svg.namespaceURI, "line");
  tip.className = "tip"; tip.hidden = true; cross.setAttribute("class", "cross");
  cross.setAttribute("y1", 26); cross.setAttribute("y2", 226);
  const nearest = (points, px) => points.reduce((a, b) => (Math.abs(b[0] - px) < Math.abs(a[0] - px) ? b : a));
  const text = (v) => data.percent ? (100 * v).toFixed(1) + " %" : v.toLocaleString("en", { maximumSignificantDigits: 4 });
  const hide = () => { tip.hidden = true; cross.remove(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = 400 / box.width;
    const [px, x] = nearest(all, (event.clientX - box.left) * scale);
    tip.replaceChildren(Object.assign(document.createElement("div"), { textContent: data.names ? data.names[x] : data.x.split(" (")[0] + " " + x.toLocaleString("en") }));
    data.series.forEach((s) => {
      const point = s.points.length && nearest(s.points, px);
      if (!point || Math.abs(point[0] - px) > 0.6) return;
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.className = "ink" + s.ink;
      row.append(dot, s.label + "  " + text(point[2]));
      tip.append(row);
    });
    cross.setAttribute("x1", px); cross.setAttribute("x2", px);
    if (!cross.parentNode) svg.append(cross);
    if (!tip.parentNode) figure.append(tip);
    tip.hidden = false;
    const left = px / scale, flip = left > box.width / 2;
    tip.style.left = Math.max(0, flip ? left - tip.offsetWidth - 12 : left + 12) + "px";
    tip.style.top = svg.offsetTop + 30 + "px";
  });
});
document.querySelectorAll(".probes").forEach((probes) => {
  const articles = [...probes.querySelectorAll("article")];
  if (articles.length < 2) return;
  const bar = document.createElement("div");
  bar.className = "pick"; bar.setAttribute("role", "group"); bar.setAttribute("aria-label", "question");
  const buttons = articles.map((_, i) => {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = "question " + (i + 1);
    button.addEventListener("click", () => pick(i));
    bar.append(button);
    return button;
  });
  const pick = (chosen) => articles.forEach((article, i) => {
    article.hidden = i !== chosen;
    article.style.marginTop = 0;
    buttons[i].setAttribute("aria-pressed", i === chosen);
  });
  probes.prepend(bar);
  pick(0);
});
