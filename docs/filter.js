// A box above tables: rows without all of its words are hidden, and tables without rows with their headings.
// A table that opens is opened while there are words.
for (const box of document.querySelectorAll("input.filter")) {
  box.hidden = false
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/)
    for (const table of document.querySelectorAll("article table")) {
      const details = table.closest("details")
      const frame = details ?? table.closest(".md-typeset__scrollwrap") ?? table
      if (box.compareDocumentPosition(frame) & Node.DOCUMENT_POSITION_PRECEDING) continue
      let shown = 0
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase()
        row.hidden = !words.every((word) => text.includes(word))
        shown += !row.hidden
      }
      if (details) details.open = box.value !== ""
      const before = frame.previousElementSibling
      for (const part of [frame, before?.tagName === "H2" ? before : frame]) part.hidden = !shown
    }
  })
}
