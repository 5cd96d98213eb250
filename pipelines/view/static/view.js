// Keys, copying, the theme, and ranges chosen by dragging over a histogram. The pages work without it.
(() => {
  "use strict";
  const root = document.documentElement;
  const find = (selector, from) => (from || document).querySelector(selector);
  const all = (selector, from) => [...(from || document).querySelectorAll(selector)];
  try { if (localStorage.theme) root.dataset.theme = localStorage.theme; } catch (error) { /* no storage */ }

  const say = (text) => { const place = find("#status"); if (place) place.textContent = text; };

  const copy = async (button) => {
    const url = button.dataset.copyUrl;
    const text = url ? await (await fetch(url)).text() : find(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
      say("copied");
    } catch (error) {
      const range = document.createRange();
      if (!url) { range.selectNodeContents(find(button.dataset.copy)); getSelection().removeAllRanges(); getSelection().addRange(range); }
      say("selected: copy it with the keyboard");
    }
  };

  const move = (step) => {
    const rows = all("[data-row]");
    if (!rows.length) return;
    const at = rows.indexOf(document.activeElement);
    const next = rows[Math.min(rows.length - 1, Math.max(0, at < 0 ? 0 : at + step))];
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  };

  const follow = (name) => { const link = find(`[data-key="${name}"]`); if (link) link.click(); return Boolean(link); };
  const pages = { r: "runs", p: "preferences", a: "agreement", j: "judges", c: "constitution", l: "label", t: "training" };
  let going = false;

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select");
    if (event.key === "Escape" && typing) { typing.blur(); return; }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key;
    if (going) { going = false; if (pages[key] && find(`nav a[href^="${pages[key]}"]`)) { find(`nav a[href^="${pages[key]}"]`).click(); event.preventDefault(); } return; }
    if (follow(key)) { event.preventDefault(); return; }
    if (key === "g") going = true;
    else if (key === "j" || key === "ArrowDown" && document.activeElement.matches("[data-row]")) { move(1); event.preventDefault(); }
    else if (key === "k" || key === "ArrowUp" && document.activeElement.matches("[data-row]")) { move(-1); event.preventDefault(); }
    else if (key === "/") { const box = find("input[type=search]"); if (box) { box.focus(); event.preventDefault(); } }
    else if (key === "?") { find("#keys").showModal(); event.preventDefault(); }
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.copy || button.dataset.copyUrl) copy(button);
    if (button.dataset.show) find(button.dataset.show).showModal();
    if (button.dataset.close !== undefined) button.closest("dialog").close();
    if (button.dataset.expand) all(`${button.dataset.expand} details`).forEach((one) => { one.open = true; });
    if (button.dataset.toggleTheme !== undefined) {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      try { localStorage.theme = root.dataset.theme; } catch (error) { /* no storage */ }
    }
  });

  document.addEventListener("change", (event) => {
    const form = event.target.closest("form[data-auto]");
    if (form) form.requestSubmit();
  });

  // In pages that are files the rows are filtered here. The filters stand after # in the address.
  const fixed = find("form[data-static]");
  const filter = () => {
    const data = new FormData(fixed), words = (data.get("q") || "").toLowerCase(), outcomes = data.getAll("outcome");
    let n = 0;
    all(".rows > li[data-outcome]").forEach((row) => {
      const inside = ["p", "spread", "length"].every((name) => {
        const low = data.get(`${name}_min`), high = data.get(`${name}_max`), value = row.dataset[name];
        return (!low && !high) || (value !== "" && (!low || value - low >= 0) && (!high || value - high <= 0));
      });
      const named = ["principle", "judge", "tag"].every((name) => !data.get(name) || JSON.parse(row.dataset[name]).includes(data.get(name)));
      const shown = inside && named && (!outcomes.length || outcomes.includes(row.dataset.outcome)) && (!words || row.textContent.toLowerCase().includes(words));
      row.hidden = !shown;
      n += shown;
    });
    find("#found").textContent = `${n.toLocaleString("en")} preferences`;
    history.replaceState(null, "", `#${new URLSearchParams([...data].filter(([, value]) => value))}`);
  };
  const fill = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    all("input, select", fixed).forEach((one) => {
      if (one.type === "checkbox") one.checked = given.getAll(one.name).includes(one.value);
      else one.value = given.get(one.name) || "";
    });
    filter();
  };
  if (fixed) {
    fixed.addEventListener("submit", (event) => { event.preventDefault(); event.stopPropagation(); filter(); });
    find("[data-clear]").addEventListener("click", (event) => { event.preventDefault(); fixed.reset(); location.hash = ""; fill(); });
    addEventListener("hashchange", fill);
    if (location.hash.length > 1) fill();
  }

  // Only what is set stands in the address of a filter.
  document.addEventListener("submit", (event) => {
    if (!event.target.matches("form[method=get]")) return;
    all("input, select", event.target).forEach((one) => { if (!one.value) one.disabled = true; });
    setTimeout(() => all("[disabled]", event.target).forEach((one) => { one.disabled = false; }), 0);
  });

  // Dragging over a histogram.
  let drag = null;
  const place = (figure, x) => {
    const box = find("svg", figure).getBoundingClientRect();
    const share = Math.min(1, Math.max(0, ((x - box.left) / box.width * 260 - 4) / 252));
    return { share, value: Number(figure.dataset.low) + share * (figure.dataset.high - figure.dataset.low) };
  };
  document.addEventListener("pointerdown", (event) => {
    const figure = event.target.closest(".hist");
    if (figure) { drag = { figure, from: place(figure, event.clientX) }; figure.setPointerCapture(event.pointerId); }
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const to = place(drag.figure, event.clientX), brush = find(".brush", drag.figure);
    const start = Math.min(drag.from.share, to.share), end = Math.max(drag.from.share, to.share);
    brush.setAttribute("x", 4 + 252 * start);
    brush.setAttribute("width", 252 * (end - start));
  });
  document.addEventListener("pointerup", (event) => {
    if (!drag) return;
    const to = place(drag.figure, event.clientX), name = drag.figure.dataset.name, form = find("form[data-auto]");
    const few = (value) => (Math.abs(value) >= 20 ? value.toFixed(0) : value.toFixed(3));
    const values = Math.abs(to.share - drag.from.share) < 0.02 ? ["", ""] : [drag.from.value, to.value].sort((x, y) => x - y).map(few);
    drag = null;
    [find(`[name=${name}_min]`, form).value, find(`[name=${name}_max]`, form).value] = values;
    form.requestSubmit();
  });
})();
