// Accessibility that Dash's controls lack: sliders and drop-downs get the label of their field as a name, Tab stops
// once at a drop-down instead of a second time at a hidden element, and a slider over a list says its entry, not a number.
(() => {
  const named = (control, names) => {
    if (control.getAttribute("aria-labelledby") !== names) control.setAttribute("aria-labelledby", names);
  };
  const nameEntry = thumb => {
    const marks = thumb.closest(".dash-slider-root").querySelectorAll(".dash-slider-mark");
    const entry = marks[Number(thumb.getAttribute("aria-valuenow"))]?.textContent ?? "";
    if (thumb.getAttribute("aria-valuetext") !== entry) thumb.setAttribute("aria-valuetext", entry);
  };
  const nameControls = () => {
    document.querySelectorAll(".budget [role=slider]").forEach(nameEntry);
    for (const label of document.querySelectorAll(".field > label[id]")) {
      const field = label.parentElement;
      for (const part of field.querySelectorAll("[role=slider], .dash-range-slider-input")) named(part, label.id);
      for (const button of field.querySelectorAll("button.dash-dropdown")) {
        named(button, `${label.id} ${button.id}-value`);
        button.tabIndex = 0;
      }
      for (const proxy of field.querySelectorAll(".dash-dropdown-focus-target")) proxy.disabled = true;
    }
  };
  const changes = { childList: true, subtree: true, attributeFilter: ["aria-valuenow"] };
  new MutationObserver(nameControls).observe(document.documentElement, changes);
  nameControls();
})();
