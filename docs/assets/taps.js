// The words behind an abbreviation, on a phone: a tap opens them below the page, another tap closes them.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.createElement("p");
  box.className = "tap";
  box.hidden = true;
  box.setAttribute("role", "status");
  document.body.append(box);
  document.querySelectorAll(".md-content abbr[title]").forEach((word) => {
    const long = word.title;
    word.tabIndex = 0;
    const open = (event) => {
      event.stopPropagation();
      box.replaceChildren(Object.assign(document.createElement("b"), { textContent: word.textContent }), `: ${long}`);
      box.hidden = false;
    };
    word.addEventListener("click", open);
    word.addEventListener("keydown", (event) => { if (event.key === "Enter") open(event); });
  });
  document.addEventListener("click", () => { box.hidden = true; });
});
