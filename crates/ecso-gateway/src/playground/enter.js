// Opens the playground, unless the browser only prepares the page in advance.
const enter = () => document.forms[0].submit();
if (document.prerendering) document.addEventListener("prerenderingchange", enter, { once: true });
else enter();
