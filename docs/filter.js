// A box above tables: rows without all of its words are hidden, and sections and tables without rows.
// It says how many rows are left; Escape empties it. A table that opens is opened while there are words.
const rowsOf = (part) => [...part.querySelectorAll("tbody tr")]

for (const box of document.querySelectorAll("input.filter")) {
  const count = document.createElement("output")
  count.className = "filtered"
  box.after(count)
  box.hidden = false

  const follows = (part) => box.compareDocumentPosition(part) & Node.DOCUMENT_POSITION_FOLLOWING
  const tables = [...document.querySelectorAll("article table")].filter(follows)
  const frames = tables.map((table) => table.closest("details") ?? table.closest(".md-typeset__scrollwrap") ?? table)
  const sections = [...document.querySelectorAll("article h2")].filter(follows).map((heading) => {
    const parts = [heading]
    while (parts.at(-1).nextElementSibling && parts.at(-1).nextElementSibling.tagName !== "H2") {
      parts.push(parts.at(-1).nextElementSibling)
    }
    return parts
  })

  const filter = () => {
    const words = box.value.toLowerCase().split(/\s+/)
    const rows = tables.flatMap(rowsOf)
    for (const row of rows) {
      const text = row.textContent.toLowerCase()
      row.hidden = !words.every((word) => text.includes(word))
    }
    for (const frame of frames) {
      frame.hidden = !(frame.querySelectorAll("tbody tr:not([hidden])").length)
      if (frame.tagName === "DETAILS") frame.open = box.value !== ""
    }
    for (const parts of sections) {
      const inside = parts.flatMap(rowsOf)
      const empty = inside.length > 0 && inside.every((row) => row.hidden)
      for (const part of parts) if (!frames.includes(part)) part.hidden = empty
    }
    const left = rows.filter((row) => !row.hidden).length
    count.textContent = !box.value ? ""
      : left ? `${left} of ${rows.length} rows`
      : "No row has all of these words. Use fewer words; Escape empties the box."
  }
  box.addEventListener("input", filter)
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return
    box.value = ""
    filter()
  })
}

// A link to a row leads into what is folded.
const unfold = () => {
  const row = document.getElementById(decodeURIComponent(location.hash.slice(1)))
  const details = row?.closest("details")
  if (!details || details.open) return
  details.open = true
  row.scrollIntoView()
}
addEventListener("hashchange", unfold)
unfold()
