// Turn the headings of sortable tables into buttons: the first click sorts in ascending order, the next one reverses.
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending", number = head.classList.contains("number");
      const key = row => row.cells[column].dataset.key;
      const compare = (a, b) => number ? a - b : a.localeCompare(b, "en", {numeric: true});
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");  // unknown values are last in both orders
        return (up ? 1 : -1) * compare(x, y);
      };
      body.append(...[...body.rows].sort(order));
      heads.forEach(other => other.setAttribute("aria-sort", other === head ? (up ? "ascending" : "descending") : "none"));
    });
  });
});
