"""What Flickr's licence ids mean, for people who look at a photo's record.

Which licences are asked for is a setting; ids are kept as given in `license_id`.
"""

#: Name and page by id, as `flickr.photos.licenses.getInfo` documents them (flickr.com/services/api).
_LICENCES: dict[str, tuple[str, str | None]] = {
    "0": ("All rights reserved", None),
    "1": ("CC BY-NC-SA 2.0", "https://creativecommons.org/licenses/by-nc-sa/2.0/"),
    "2": ("CC BY-NC 2.0", "https://creativecommons.org/licenses/by-nc/2.0/"),
    "3": ("CC BY-NC-ND 2.0", "https://creativecommons.org/licenses/by-nc-nd/2.0/"),
    "4": ("CC BY 2.0", "https://creativecommons.org/licenses/by/2.0/"),
    "5": ("CC BY-SA 2.0", "https://creativecommons.org/licenses/by-sa/2.0/"),
    "6": ("CC BY-ND 2.0", "https://creativecommons.org/licenses/by-nd/2.0/"),
    "7": ("No known copyright restrictions", "https://www.flickr.com/commons/usage/"),
    "8": ("United States Government Work", "https://www.usa.gov/government-copyright"),
    "9": ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "10": ("Public Domain Mark 1.0", "https://creativecommons.org/publicdomain/mark/1.0/"),
}


def licence(license_id: str | None) -> dict[str, str | None]:
    """A licence as people read it.

    Args:
        license_id: Flickr's id; None if it was not given.

    Returns:
        `name`, and `url` of the licence's text or None. Ids that are not known here are named as such: a wrong
        licence is worse than none.
    """
    if license_id is None:
        return {"name": "licence not recorded: see the photo's page", "url": None}
    name, url = _LICENCES.get(license_id, (f"Flickr licence {license_id}: see the photo's page", None))
    return {"name": name, "url": url}
