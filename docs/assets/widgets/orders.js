// The lowering: three loop orders at the same number of loads. Cells carry the number of the load
// that works on them; stepping only shows and counts what docs/hooks/orders.py wrote.
for (const box of document.querySelectorAll('[data-widget="orders"]')) {
  const { orders } = JSON.parse(box.querySelector("script").textContent);
  const most = Math.max(...orders.map((loads) => loads.length));
  const notes = [...box.querySelectorAll(".w-now")].map((note) => note.textContent);
  const controls = document.createElement("div");
  controls.className = "w-steps";
  const button = (words, label, act) => {
    const made = Object.assign(document.createElement("button"), { type: "button", textContent: words });
    made.className = "md-button";
    made.setAttribute("aria-label", label);
    made.addEventListener("click", act);
    return made;
  };
  const slider = Object.assign(document.createElement("input"), { type: "range", name: "step", min: 0, max: most, value: most });
  slider.setAttribute("aria-label", "blocks loaded so far");
  const shown = document.createElement("output");
  const move = (by) => { slider.value = Number(slider.value) + by; show(); };
  controls.append(
    button("‹", "one load back", () => move(-1)), slider, button("›", "one load on", () => move(1)), shown,
  );

  const words = ({ group, block, queries, idle }) =>
    `block ${block} of group ${group} for ${queries.length > 1 ? "queries" : "query"} ${queries.join(", ")}` +
    (idle.length ? `; ${idle.join(", ")} masked` : "");

  function show() {
    const step = Number(slider.value);
    shown.textContent = `after ${step} loads each`;
    slider.setAttribute("aria-valuetext", shown.textContent);
    for (const [n, loads] of orders.entries()) {
      const panel = box.querySelector(`[data-order="${n}"]`);
      const done = loads.slice(0, step), last = done.length === step ? done.at(-1) : undefined;
      const sum = (of) => done.reduce((total, load) => total + of(load), 0);
      const counts = { loads: done.length, partials: sum((x) => x.partials), idle: sum((x) => x.idle.length) };
      for (const [name, value] of Object.entries(counts)) {
        panel.querySelector(`[data-count="${name}"]`).textContent = value;
      }
      for (const cell of panel.querySelectorAll("[data-load]")) {
        const load = Number(cell.dataset.load);
        cell.classList.toggle("w-later", load > step);
        cell.classList.toggle("w-last", load === step && step < most);
      }
      const rest = step === 0 ? "nothing yet" : step === most ? notes[n] : "done";
      panel.querySelector(".w-now").textContent = last && step < most ? words(last) : rest;
    }
  }
  slider.addEventListener("input", show);
  box.prepend(controls);
  show();
}
