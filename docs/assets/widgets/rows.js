// Chapter 3: the blocks that a trained layer scores and reads, query by query. Scores (in tenths)
// and chosen blocks were computed by docs/hooks/rows.py.
for (const box of document.querySelectorAll('[data-widget="rows"]')) {
  const { layers, questions, start } = JSON.parse(box.querySelector("script").textContent);
  const queries = layers[0].scores.length;
  const make = (tag, more) => Object.assign(document.createElement(tag), more);
  const find = (name, value) => box.querySelector(`[data-${name}="${value}"]`);

  const slider = make("input", { type: "range", name: "query", min: 0, max: queries - 1, value: start.query });
  const shown = make("output"), choice = make("select", { name: "layer" }), controls = make("div");
  controls.className = "w-controls";
  for (const n of layers.keys()) choice.append(make("option", { value: n, textContent: n + 1 }));
  choice.value = start.layer;
  const [row, pick, jumps] = [make("label"), make("label"), make("div")];
  row.append("query ", shown, slider);
  pick.append("layer ", choice);
  for (const { key, place } of questions) {
    const jump = make("button", { type: "button", className: "md-button", textContent: `?${key}=` });
    jump.addEventListener("click", () => { slider.value = place; show(); });
    jumps.append(jump, " ");
  }
  controls.append(row, pick, jumps);

  function show() {
    const query = Number(slider.value), { scores, chosen } = layers[choice.value];
    shown.textContent = query;
    box.querySelector(".w-query").classList.remove("w-query");
    find("token", query).classList.add("w-query");
    for (const card of box.querySelectorAll(".w-block")) {
      const b = Number(card.dataset.block);
      card.classList.toggle("w-later", b >= scores[query][0].length);
      for (const [r, row] of scores[query].entries()) {
        const [low, high] = [Math.min(...row), Math.max(...row)];
        const part = high > low ? (row[b] - low) / (high - low) : 1;
        card.classList.toggle(`w-read${r}`, chosen[query][r].includes(b));
        find("bar", `${r}.${b}`).style.width = `${b < row.length ? 100 * part : 0}%`;
        find("cell", `${r}.${b}`).textContent = b < row.length ? (row[b] / 10).toFixed(1) : "";
      }
    }
  }
  const point = ({ target }) => {
    const token = target.closest("[data-token]");
    if (token) { slider.value = token.dataset.token; show(); }
  };
  box.addEventListener("click", point);
  slider.addEventListener("input", show);
  choice.addEventListener("change", show);
  box.prepend(controls);
  show();
}
