// The parts of the DOM that the script under test uses.
function stubPage(data, ids) {
  const made = [];
  const byId = {};

  class Element {
    constructor(tag) {
      Object.assign(this, { tag, children: [], style: {}, dataset: {}, listeners: {}, parent: null });
      Object.assign(this, { className: "", hidden: false, checked: false, value: "", tabIndex: 0 });
      this.attributes = {};
      const names = () => this.className.split(" ").filter(Boolean);
      this.classList = {
        contains: (name) => names().includes(name),
        remove: (name) => { this.className = names().filter((n) => n !== name).join(" "); },
        toggle: (name, isOn) => {
          this.classList.remove(name);
          if (isOn) this.className = [...names(), name].join(" ");
        },
      };
    }

    get textContent() {
      return this.children.map((c) => (typeof c === "string" ? c : c.textContent)).join("");
    }

    set textContent(text) {
      this.children = text === "" ? [] : [String(text)];
    }

    append(...children) {
      children.forEach((child) => { if (child instanceof Element) child.parent = this; });
      this.children.push(...children);
    }

    replaceChildren() { this.children = []; }
    setAttribute(name, value) { this.attributes[name] = value; }
    addEventListener(type, listener) { (this.listeners[type] ||= []).push(listener); }
    getBoundingClientRect() { return { left: 0, top: 0, bottom: 0 }; }
    focus() {}
    matches(selector) {
      return selector.startsWith(".")
        ? this.classList.contains(selector.slice(1)) : this.tag === selector;
    }

    closest(selector) {
      return this.matches(selector) ? this : this.parent && this.parent.closest(selector);
    }

    querySelector() { return null; }

    // An event that rises to the document.
    fire(type, fields = {}) {
      const event = { target: this, preventDefault() {}, ...fields };
      for (let at = this; at; at = at.parent) (at.listeners[type] || []).forEach((l) => l(event));
      (root.listeners[type] || []).forEach((listener) => listener(event));
    }
  }

  const root = new Element("html");
  ids.forEach((id) => { byId[id] = new Element("div"); });
  byId.theme.value = "system";
  byId.data = new Element("script");
  byId.data.textContent = data;
  const all = (element) => [element, ...element.children.filter((c) => c instanceof Element).flatMap(all)];
  const document = {
    documentElement: root,
    getElementById: (id) => byId[id],
    createElement: (tag) => { made.push(tag); return new Element(tag); },
    querySelectorAll: (selector) => all(byId.rows).filter((element) => element.matches(selector)),
    addEventListener: (type, listener) => root.addEventListener(type, listener),
  };
  return { document, window: { innerWidth: 1000, innerHeight: 800 }, made };
}
