// The one helper that builds elements. Text is always a text node.

export function element(tag, { data, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}
