document.querySelectorAll("table").forEach(table=>{table.querySelectorAll("th").forEach((head,column)=>{
 const sort=()=>{const down=head.getAttribute("aria-sort")==="ascending";
  const key=row=>{const cell=row.cells[column];return cell.dataset.v===undefined?cell.textContent:+cell.dataset.v};
  const rows=[...table.tBodies[0].rows].sort((a,b)=>{const x=key(a),y=key(b);
   return (typeof x==="number"&&typeof y==="number"?x-y:String(x).localeCompare(String(y)))*(down?-1:1)});
  table.querySelectorAll("th").forEach(other=>other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort",down?"descending":"ascending");table.tBodies[0].append(...rows)};
 head.tabIndex=0;head.addEventListener("click",sort);
 head.addEventListener("keydown",event=>{if(event.key==="Enter")sort()})});
 if(table.tBodies[0].rows.length<9)return;
 const find=document.createElement("input");find.type="search";find.placeholder="show rows with …";find.setAttribute("aria-label",find.placeholder);
 find.addEventListener("input",()=>{const words=find.value.toLowerCase().split(/\s+/);
  for(const row of table.tBodies[0].rows)row.hidden=!words.every(word=>row.textContent.toLowerCase().includes(word))});
 table.parentElement.before(find)});
