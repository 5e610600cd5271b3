// Shows Markdown as elements. Text becomes text nodes alone, never HTML, so that no answer can put a script, a style or
// an image into the page. Every pattern is tried in time linear in the text, and nesting has a limit.

const MAX_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const indentOf = (line) => line.length - line.trimStart().length;

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

// Shows `text` in `container`. What is shown already and has not changed stays, with what a reader selected in it.
export function showMarkdown(container, text) {
  const blocks = blocksOf(text.replace(/\r\n?/g, "\n").split("\n"), 0);
  const shown = [...container.children];
  blocks.forEach((block, at) => {
    if (shown[at]?.source === block.source) return;
    const made = block.build();
    made.source = block.source;
    if (shown[at]) shown[at].replaceWith(made);
    else container.append(made);
  });
  shown.slice(blocks.length).forEach((left) => left.remove());
}

// Returns the source of each block, and what builds its element.
function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  const take = (end, build) => {
    blocks.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    let end = at + 1, match;
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const closes = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}\\s*$`), indent = indentOf(line);
      while (end < lines.length && !closes.test(lines[end])) end++;
      const code = lines.slice(at + 1, end).map((each) => each.slice(Math.min(indent, indentOf(each)))).join("\n");
      const language = match[2];
      take(Math.min(end + 1, lines.length), () => codeBlock(code, language));
    } else if ((match = HEADING.exec(line))) {
      const [, marks, title] = match; // the page has headings of its own above these
      take(end, () => element(`h${Math.min(marks.length + 1, 6)}`, ...inline(title.replace(/\s+#+\s*$/, ""))));
    } else if (RULE.test(line)) {
      take(end, () => element("hr"));
    } else if (depth < MAX_DEPTH && QUOTE.test(line)) {
      while (end < lines.length && lines[end].trim() && !startsBlock(lines, end, QUOTE)) end++;
      const inner = lines.slice(at, end).map((each) => each.replace(QUOTE, ""));
      take(end, () => element("blockquote", ...elementsOf(inner, depth + 1)));
    } else if (depth < MAX_DEPTH && ITEM.test(line)) {
      end = endOfList(lines, at);
      const inner = lines.slice(at, end);
      take(end, () => list(inner, depth));
    } else if (isTable(lines, at)) {
      while (end < lines.length && lines[end].includes("|")) end++;
      const rows = lines.slice(at, end);
      take(end, () => table(rows));
    } else {
      while (end < lines.length && lines[end].trim() && !(depth < MAX_DEPTH && startsBlock(lines, end))) end++;
      const paragraph = lines.slice(at, end).map((each) => each.trim()).join("\n");
      take(end, () => element("p", ...inline(paragraph)));
    }
  }
  return blocks;
}

const elementsOf = (lines, depth) => blocksOf(lines, depth).map((block) => block.build());

// Says whether the line ends the paragraph before it; `except` is what goes on with it.
function startsBlock(lines, at, except = null) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((each) => each !== except && each.test(line)) || isTable(lines, at);
}

const isOrdered = (marker) => /\d/.test(marker);

function endOfList(lines, start) {
  const [, space, marker] = ITEM.exec(lines[start]);
  let end = start + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (!line.trim()) continue;
    if (indentOf(line) > space.length + 1) continue; // belongs to an item
    const item = ITEM.exec(line);
    if (item ? isOrdered(item[2]) === isOrdered(marker) && !RULE.test(line) : false) continue;
    if (!lines[end - 1].trim() || startsBlock(lines, end)) break; // else a paragraph goes on
  }
  while (!lines[end - 1].trim()) end--;
  return end;
}

function list(lines, depth) {
  const [, space, marker] = ITEM.exec(lines[0]);
  const made = element(isOrdered(marker) ? "ol" : "ul");
  if (isOrdered(marker)) made.start = Number.parseInt(marker, 10);
  let item = [];
  const close = () => {
    if (!item.length) return;
    const parts = elementsOf(item, depth + 1);
    // The text of a tight item stands in the item itself, without the margins of a paragraph.
    made.append(element("li", ...(parts[0]?.tagName === "P" ? [...parts.shift().childNodes, ...parts] : parts)));
  };
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && indentOf(line) <= space.length + 1) {
      close();
      item = [line.slice(match[0].length)];
    } else item.push(line.slice(Math.min(indentOf(line), space.length + marker.length + 1)));
  }
  close();
  return made;
}

function cellsOf(row) {
  const cells = row.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/);
  return cells.map((each) => each.trim().replaceAll("\\|", "|"));
}

function isTable(lines, at) {
  const rule = lines[at + 1];
  if (!rule?.includes("-") || !rule.includes("|") || !lines[at].includes("|")) return false;
  const cells = cellsOf(rule);
  return cells.every((each) => /^:?-+:?$/.test(each)) && cells.length === cellsOf(lines[at]).length;
}

function table([head, rule, ...rows]) {
  const sides = cellsOf(rule).map((each) => (each.endsWith(":") ? (each.startsWith(":") ? "center" : "right") : ""));
  const row = (text, tag) => {
    const cells = cellsOf(text);
    return element("tr", ...sides.map((side, at) => {
      const cell = element(tag, ...inline(cells[at] ?? ""));
      if (side) cell.className = side;
      return cell;
    }));
  };
  const made = element("table", element("thead", row(head, "th")), element("tbody", ...rows.map((each) => row(each, "td"))));
  const frame = element("div", made); // scrolls by itself where a table is wider than the page
  frame.className = "table";
  frame.tabIndex = 0;
  return frame;
}

function codeBlock(code, language) {
  const made = document.getElementById("code-block").content.cloneNode(true).firstElementChild;
  made.querySelector(".language").textContent = language || "text";
  made.querySelector("code").append(...highlighted(code, language.toLowerCase()));
  return made;
}

// One pattern a language family is enough to tell comments, strings, numbers and keywords apart.
const HASH = new Set("python py sh bash shell zsh yaml yml toml ruby rb r perl dockerfile makefile".split(" "));
const PLAIN = new Set(["", ..."text txt plain plaintext markdown md output console csv".split(" ")]);
const KEYWORDS = "abstract|and|as|assert|async|await|bool|break|case|catch|char|class|const|constexpr|continue|def|default|del|delete|do|double|" +
  "elif|else|enum|except|export|extends|false|False|final|finally|float|fn|for|from|func|function|global|if|impl|import|in|" +
  "instanceof|int|interface|is|lambda|let|long|match|mut|new|nil|None|not|null|or|package|pass|private|protected|pub|public|raise|" +
  "return|self|static|struct|super|switch|this|throw|trait|true|True|try|type|typeof|undefined|use|using|var|void|while|with|yield|" +
  "SELECT|FROM|WHERE|INSERT|INTO|UPDATE|DELETE|CREATE|TABLE|JOIN|LEFT|ON|GROUP|ORDER|BY|LIMIT|AND|OR|NOT|NULL|VALUES|SET|AS|" +
  "echo|fi|then|done|esac|local";
const STRINGS = String.raw`"""[^]*?"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|${"`"}(?:\\[^]|[^${"`"}\\])*${"`"}`;
const rest = String.raw`(?<number>\b\d[\w.]*)|(?<keyword>\b(?:${KEYWORDS})\b)|[A-Za-z_$][\w$]*`;
const BY_HASH = new RegExp(String.raw`(?<comment>(?<![\w$])#.*)|(?<string>${STRINGS})|${rest}`, "g");
const BY_SLASH = new RegExp(String.raw`(?<comment>\/\/.*|\/\*[^]*?\*\/|(?<!\S)--\s.*|<!--[^]*?-->)|(?<string>${STRINGS})|${rest}`, "g");
const MAX_HIGHLIGHTED = 20_000; // characters; longer code is shown plain

function highlighted(code, language) {
  if (PLAIN.has(language) || code.length > MAX_HIGHLIGHTED) return [code];
  const nodes = [];
  let done = 0;
  for (const match of code.matchAll(HASH.has(language) ? BY_HASH : BY_SLASH)) {
    const kind = Object.keys(match.groups).find((each) => match.groups[each] !== undefined);
    if (!kind) continue;
    const span = element("span", match[0]);
    span.className = kind;
    nodes.push(code.slice(done, match.index), span);
    done = match.index + match[0].length;
  }
  return [...nodes, code.slice(done)];
}

const ESCAPE = /\\([!-/:-@[-`{-~])/y;
const TICKS = /`+/y;
const LINK = /!?\[([^[\]\n]*)\]\(\s{0,9}<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s{1,9}"[^"\n]*")?\s{0,9}\)/y;
const ADDRESS = /https?:\/\/[^\s<>"`*]+/y;
const BREAK = /\n|<br\s?\/?>/iy;
const MARK = /\*\*|__|~~|[*_]/y;
const WORDS = /[^\\`!\[<\n*_~h]+|[^]/y;
const TAGS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };

// Returns the nodes of a text within a line or a paragraph.
function inline(text, depth = 0) {
  const nodes = [];
  const never = new Set(); // the marks that nothing closes any more: they are not looked for again
  let at = 0, plain = "";
  const put = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  const next = (pattern) => {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    return match;
  };
  while (at < text.length) {
    let match, end;
    if ((match = next(ESCAPE))) {
      plain += match[1];
      at += 2;
    } else if ((match = next(TICKS))) {
      end = endOfTicks(text, at + match[0].length, match[0], never);
      if (end < 0) {
        plain += match[0];
        at += match[0].length;
      } else {
        const code = text.slice(at + match[0].length, end).replaceAll("\n", " ");
        put(element("code", /^ .*\S.* $/.test(code) ? code.slice(1, -1) : code));
        at = end + match[0].length;
      }
    } else if ((match = next(LINK))) {
      put(link(match[2], match[1] ? inline(match[1], depth + 1) : [match[2]]));
      at += match[0].length;
    } else if ((text[at] === "h" || text[at] === "H") && !/\w/.test(text[at - 1] ?? "") && (match = next(ADDRESS))) {
      const address = match[0].replace(/[.,;:!?'\])}]{1,9}$/, (end) => (end[0] === ")" && match[0].includes("(") ? ")" : ""));
      put(link(address, [address]));
      at += address.length;
    } else if ((match = next(BREAK))) {
      put(element("br"));
      at += match[0].length;
    } else if ((match = next(MARK))) {
      const mark = match[0];
      end = depth < MAX_DEPTH ? endOfMark(text, at, mark, never) : -1;
      if (end < 0) {
        plain += mark;
        at += mark.length;
      } else {
        put(element(TAGS[mark], ...inline(text.slice(at + mark.length, end), depth + 1)));
        at = end + mark.length;
      }
    } else {
      match = next(WORDS);
      plain += match[0];
      at += match[0].length;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function endOfTicks(text, from, ticks, never) {
  if (never.has(ticks)) return -1;
  for (let end = text.indexOf(ticks, from); end >= 0; ) {
    let after = end;
    while (text[after] === "`") after++;
    if (after - end === ticks.length) return end;
    end = text.indexOf(ticks, after);
  }
  never.add(ticks);
  return -1;
}

function endOfMark(text, at, mark, never) {
  const start = at + mark.length, letter = mark[0];
  const isWord = (each) => each !== undefined && /[\p{L}\p{N}]/u.test(each);
  if (never.has(mark) || !text[start]?.trim() || (letter === "_" && isWord(text[at - 1]))) return -1;
  for (let end = text.indexOf(mark, start + 1); end >= 0; ) {
    let after = end;
    while (text[after] === letter) after++;
    const length = after - end;
    const fits = mark.length === 2 ? length >= 2 : length !== 2; // ** within * is of another pair
    if (fits && text[end - 1].trim() && text[end - 1] !== "\\" && !(letter === "_" && isWord(text[after])))
      return after - mark.length;
    end = text.indexOf(mark, after);
  }
  never.add(mark);
  return -1;
}

// Only addresses that open a page or a mail are links: `javascript:` and the like stay text.
function link(address, children) {
  if (!/^(?:https?:|mailto:)/i.test(address)) return element("span", ...children, ` (${address})`);
  const made = element("a", ...children);
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}
