// Accessibility that Dash's controls lack: sliders and drop-downs get the label of their field as a name, and Tab stops
// once at a drop-down instead of a second time at a hidden element.
(() => {
  const named = (control, names) => {
    if (control.getAttribute("aria-labelledby") !== names) control.setAttribute("aria-labelledby", names);
  };
  const nameControls = () => {
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
  new MutationObserver(nameControls).observe(document.documentElement, { childList: true, subtree: true });
  nameControls();
})();
