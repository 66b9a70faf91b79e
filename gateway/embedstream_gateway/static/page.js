"use strict";

// Every two seconds the page is asked for again, and what has changed of its live sections is put in place.
const PAUSE = 2000;

function say(text) {
  const line = document.getElementById("connection");
  if (line.textContent !== text) line.textContent = text;
}

function replace(old, fresh) {
  if (old.innerHTML === fresh.innerHTML) return;
  const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  old.replaceChildren(...document.adoptNode(fresh).childNodes);
  if (focused !== null) {
    for (const link of old.querySelectorAll("a")) {
      if (link.getAttribute("href") === focused) {
        link.focus({ preventScroll: true });
        break;
      }
    }
  }
}

async function refresh() {
  const sections = document.querySelectorAll("[data-live]");
  if (document.hidden || !sections.length) return;
  try {
    const answer = await fetch(location.href);
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const section of sections) {
      const fresh = page.getElementById(section.id);
      if (fresh !== null) replace(section, fresh);
    }
    say("");
  } catch {
    say("The gateway does not answer. What is shown may be old.");
  }
}

async function live() {
  await refresh();
  setTimeout(live, PAUSE);
}

setTimeout(live, PAUSE);
