// The box for a question: Enter sends it, Shift+Enter breaks the line.
function render({ model, el }) {
  const box = document.createElement("textarea");
  box.rows = 2;
  box.placeholder = model.get("placeholder");
  box.dataset.lmSuppressShortcuts = "true"; // in JupyterLab, Shift+Enter would run the cell
  const show = () => {
    if (box.value !== model.get("value")) box.value = model.get("value");
  };
  const save = () => {
    model.set("value", box.value);
    model.save_changes();
  };
  show();
  model.on("change:value", show);
  box.addEventListener("input", save);
  box.addEventListener("keydown", (event) => {
    // While an input method composes a character, Enter takes its suggestion; 229 is how Safari says so.
    if (event.key !== "Enter" || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    // JupyterLab, whose key for running a cell it is, takes the line break away: it is put in here.
    if (event.shiftKey) box.setRangeText("\n", box.selectionStart, box.selectionEnd, "end");
    save();
    if (!event.shiftKey) model.send("send");
  });
  el.append(box);
  return () => model.off("change:value", show);
}
export default { render };
