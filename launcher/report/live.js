"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("live");
  let every = Number(button.dataset.every), tag = button.dataset.tag, held = false, looking = false, waiting = 0;

  // Makes one element like another, and leaves what is alike as it is: focus, scrolling, and what was opened or
  // ticked stay. A plot's inside belongs to its figure.
  function like(old, fresh) {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== Node.ELEMENT_NODE) {
      old.data = fresh.data;
      return;
    }
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    if (!old.classList.contains("plot")) insides(old, fresh);
  }

  // Children with a key are matched by it, others by their place.
  function insides(old, fresh) {
    const keyed = new Map([...old.children].filter((one) => one.dataset.key).map((one) => [one.dataset.key, one]));
    let at = old.firstChild;
    for (const next of [...fresh.childNodes]) {
      const known = next.dataset?.key ? keyed.get(next.dataset.key) : null;
      if (known) {
        if (known === at) at = at.nextSibling;
        else old.insertBefore(known, at);
        like(known, next);
      } else if (at && at.nodeName === next.nodeName && !at.dataset?.key && at.id === next.id) {
        const here = at;
        at = at.nextSibling;
        like(here, next);
      } else {
        old.insertBefore(next, at);
      }
    }
    while (at) {
      const gone = at;
      at = at.nextSibling;
      gone.remove();
    }
  }

  async function look() {
    const address = new URL(location.href);
    address.searchParams.set("again", "1");
    address.hash = "";
    const answer = await fetch(address, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status === 200) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of ["header.page nav", "main", "footer"]) {
        like(document.querySelector(part), fresh.querySelector(part));
      }
      every = Number(fresh.getElementById("live").dataset.every);
      tag = answer.headers.get("ETag");
      root.dispatchEvent(new CustomEvent("renewed", { detail: fresh }));
      root.dataset.renewed = String(Number(root.dataset.renewed || 0) + 1);
    } else if (answer.status !== 304) {
      throw new Error(answer.status === 404 ? "this is no longer there" : "the board is another one now");
    }
  }

  async function follow() {
    if (looking) return;
    clearTimeout(waiting);
    if (!held && !document.hidden) {
      looking = true;
      try {
        await look();
        if (!held) button.textContent = "Live";
      } catch (error) {
        button.textContent = "Not live: " + (error instanceof TypeError ? "the board does not answer" : error.message);
      }
      looking = false;
    }
    waiting = setTimeout(follow, every * 1000);
  }

  button.addEventListener("click", () => {
    held = !held;
    button.textContent = held ? "Held" : "Live";
    button.setAttribute("aria-pressed", String(held));
    if (!held) follow();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) follow();
  });
  waiting = setTimeout(follow, every * 1000);
})();
