// What screen readers need and Dash's own controls lack: names of sliders and drop-downs, taken from the label of their
// field, and one place of a drop-down where Tab stops instead of a hidden second one.
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
