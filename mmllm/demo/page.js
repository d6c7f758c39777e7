() => {
  const find = selector => document.querySelector(selector);

  // The two menus and the camera are popovers, which the browser opens, places and closes.
  const popover = (selector, name, button) => {
    const panel = find(selector);
    if (!panel || panel.popover) return;
    panel.popover = 'auto';
    panel.setAttribute('role', 'group');
    panel.setAttribute('aria-label', name);
    if (!button) return;
    find(button).popoverTargetElement = panel;
    panel.addEventListener('beforetoggle', () => {  // it opens above its button
      const place = find(button).getBoundingClientRect();
      panel.style.bottom = `${innerHeight - place.top + 8}px`;
      if (place.left < innerWidth / 2) panel.style.left = `${place.left}px`;
      else panel.style.right = `${innerWidth - place.right}px`;
    });
  };

  // What Gradio leaves unnamed for keyboards and screen readers, whenever the page changes.
  const complete = () => {
    popover('#attach-menu', 'Attach', '#attach');
    popover('#more-menu', 'More', '#more');
    popover('#camera-panel', 'Camera');
    document.querySelectorAll('#conversation .examples').forEach(e => {
      e.setAttribute('role', 'group'); e.setAttribute('aria-label', 'Examples'); });
    document.querySelectorAll('#conversation .image-container > button:not([aria-label])')
      .forEach(e => e.setAttribute('aria-label', 'Enlarge the picture'));
    // Gradio edits and copies the HTML of the user's text: here the text itself.
    document.querySelectorAll('.edit-textarea:not([data-plain])').forEach(e => {
      e.dataset.plain = '';
      e.value = new DOMParser().parseFromString(e.value, 'text/html').body.textContent;
      e.dispatchEvent(new Event('input', {bubbles: true})); });
    document.querySelectorAll('button.label-wrap').forEach(e =>
      e.setAttribute('aria-expanded', e.classList.contains('open')));
  };
  new MutationObserver(complete).observe(
    document.body, {childList: true, subtree: true, attributeFilter: ['class']});
  complete();

  const small = event => {
    const width = event.target.naturalWidth || event.target.videoWidth;
    event.target.classList?.toggle('small', width < 256);
  };
  document.addEventListener('load', small, true);
  document.addEventListener('loadedmetadata', small, true);

  const copyMessage = event => {
    const button = event.target.closest('.message-buttons-right [aria-label="Copy message"]');
    if (!button) return;
    event.stopImmediatePropagation();
    const texts = button.closest('.message-buttons').previousElementSibling
      .querySelectorAll('.chatbot');
    navigator.clipboard.writeText([...texts].map(e => e.textContent).join('\n'));
  };
  document.addEventListener('click', copyMessage, true);
  document.addEventListener('click', event => {
    const button = event.target.closest('button');
    if (button?.classList.contains('copy'))
      navigator.clipboard.writeText(button.dataset.text ?? button.nextElementSibling.innerText);
    if (!button?.closest('.menu')) return;
    if (button.id == 'file') find('#message [data-testid=upload-button]').click();
    if (button.id == 'microphone') find('#message [data-testid=microphone-button]').click();
    if (!button.closest('#camera-panel')) button.closest('.menu').hidePopover();
    if (button.id == 'take-picture') find('#camera-panel').showPopover();
  });
}
